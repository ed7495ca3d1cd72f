"""Measure the error rates of verdicts: the simulations of `TESTS` with more trials.

    python benchmarks/error_rates.py
    python benchmarks/error_rates.py --trials 200          a quick look
    python benchmarks/error_rates.py --of leaders          the family of pairs behind a recommendation
    python benchmarks/error_rates.py --of hard-data        skewed differences, rare harm, items that did not change

Every rate that the tests look at is kept with its case: kind of items, shape and number of clusters, items, level, and the number of
configurations and tasks of a family. Results go to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_results

HERE = Path(__file__).parent
TESTS = {
    "error-rates": "tests/scores/test_error_rates.py",
    "leaders": "tests/compare/test_leaders_level.py",
    "hard-data": "tests/scores/test_hard_data.py",
}
"""Results file -> the simulations that it holds."""


def main() -> None:
    """Run the simulations and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000, help="trials of a single row; families use at least 2,000")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--of", choices=TESTS, default="error-rates", help="simulations to run")
    options = parser.parse_args()
    name = options.of
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        rates_file = Path(folder) / "rates.jsonl"
        environment = {
            **os.environ,
            "WORKBENCH_TRIALS": str(options.trials),
            "WORKBENCH_ERROR_RATES": str(rates_file),
            "OMP_NUM_THREADS": "1",
        }
        test = [sys.executable, "-m", "pytest", "-q", "--nightly", "all", "-n", str(options.processes), TESTS[name]]
        failed = subprocess.run(test, cwd=HERE.parent, env=environment, check=False).returncode
        rows = [json.loads(line) for line in rates_file.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: json.dumps(row, sort_keys=True))
    document = {"seconds": round(time.time() - started), "trials": options.trials, "within_limits": not failed, "rows": rows}
    write_results(HERE / "results" / f"{name}.json", document)


if __name__ == "__main__":
    main()
