"""Faults in every command that writes: each of its calls to the operating system fails in turn, ends the process, or writes half.

    python benchmarks/faults.py                            # every case, which takes hours
    WORKBENCH_FAULTS=20 python benchmarks/faults.py        # 20 cases a command, the same each time
    python benchmarks/faults.py --only run --only eval

A case is right if the command ends with the right files, or with a named error after which the same command gives them, and if nothing of
the user's is lost (`tests/worlds/fault_cases.py`). What is wrong is printed, and the exit status is 1 then.
With --write, results go to benchmarks/results/faults.json; with --only, rows of other commands stay there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Inject the faults, print a line a command, and return the exit status."""
    parser = parser_of(__doc__, "faults")
    parser.add_argument("--only", action="append", metavar="COMMAND", help="a command of the table; repeatable")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WORKBENCH_TRUST_PROJECT_CODE": "1"}
    sys.path.insert(0, str(PROJECT / "tests"))
    from worlds.fault_cases import save_models
    from worlds.fault_commands import COMMANDS
    from worlds.faults import Faults

    count = int(os.environ.get("WORKBENCH_FAULTS") or 0) or None
    before = json.loads(options.out.read_text("utf-8"))["rows"] if options.only and options.out.is_file() else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
        (folder / "server").mkdir()
        models, faults = save_models(folder / "models"), Faults(folder / "server")
        print(f"{'command':24} {'cases':>6} {'tried':>6} {'wrong':>6} {'seconds':>8}")
        for name in options.only or COMMANDS:
            rows.append(one(name, folder / name.replace(" ", "-"), models, faults, count))
            row = rows[-1]
            print(f"{name:24} {row['cases']:6} {row['injected']:6} {row['wrong']:6} {row['seconds']:8}", flush=True)
            if options.write:
                tried = {row["command"]: row for row in (*before, *rows)}
                write_results(options.out, {"sample": count, "rows": [tried[name] for name in COMMANDS if name in tried]})
        faults.close()
    return int(any(row["wrong"] for row in rows))


def one(name: str, folder: Path, models: Path, faults: Any, count: int | None) -> dict[str, Any]:
    """Inject faults into one command, print what is wrong, and return its row."""
    from worlds.fault_cases import World
    from worlds.fault_commands import COMMANDS

    started, wrong = time.monotonic(), 0
    folder.mkdir()
    with World(faults, folder, models, COMMANDS[name]) as world:
        chosen = world.sample(count)
        for fault in chosen:
            found = list(world.problems(fault))
            wrong += bool(found)
            for text in found:
                print(f"  {text}", flush=True)
        kinds = Counter(f"{fault.mode} {fault.kind}" for fault in chosen)
        return {
            "command": name,
            "cases": len(world.cases()),
            "injected": world.fired,
            "wrong": wrong,
            "kinds": dict(sorted(kinds.items())),
            "seconds": round(time.monotonic() - started),
        }


if __name__ == "__main__":
    sys.exit(main())
