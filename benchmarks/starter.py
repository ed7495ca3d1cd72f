"""The starter recipes scored on all items of all suites: the source of the tables in README and docs.

    python benchmarks/starter.py

Runs `workbench eval` and `workbench report` as `make demo FULL=1` does, and keeps the comparison, without the items, in
benchmarks/results/starter.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_results

HERE = Path(__file__).parent
SUITES = ["--suite", "starter", "--suite", "retention", "--suite", "facts", "--suite", "conflict"]


def main() -> None:
    """Score, compare, write the results file."""
    project = HERE.parent
    recipes = [f"recipes/{path.name}" for path in sorted((project / "recipes").glob("*.yaml"))]
    started = time.time()
    subprocess.run([sys.executable, "-m", "workbench", "eval", *recipes, *SUITES], cwd=project, check=True)
    seconds = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "workbench", "report", *recipes, *SUITES, "-o", str(out)], cwd=project, check=True)
        document = json.loads(out.with_suffix(".json").read_text("utf-8"))
    document.pop("flips")
    for configuration in document["configurations"]:
        configuration.pop("recipe_text", None)
    write_results(HERE / "results" / "starter.json", {"seconds": round(seconds), **document})


if __name__ == "__main__":
    main()
