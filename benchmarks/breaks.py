"""Steps in which the machine of `tests/worlds/changes.py` finds each break of `tests/worlds/breaks.py`.

    python benchmarks/breaks.py                     # every break, in about ten minutes
    python benchmarks/breaks.py --only tokenizer    # those with the word in their name

A break puts one function of the package out of order, such as a key that forgets the tokenizer. The machine changes files between commands until
one of them says something else than it does in a new project. Steps, and so the results, are the same each time. Exit status 1: a break was not
found within the 1,000 steps of a night. Results go to benchmarks/results/breaks.json; with --only, rows of other breaks stay there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from record import parser_of, write_results

WITHIN = 1000
"""Steps in which every break must be found: those of a night."""


def main() -> int:
    """Try the breaks, print a line for each, and return the exit status."""
    parser = parser_of(__doc__, "breaks")
    parser.add_argument("--only", metavar="WORD", default="", help="breaks with this word in their name")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WORKBENCH_TRUST_PROJECT_CODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.fsync = lambda fd: None  # no power failure is tried
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import pytest
    import torch

    from worlds.breaks import BREAKS
    from worlds.changes import take_steps
    from worlds.changing import lay_out

    torch.set_num_threads(1)
    found: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = lay_out(Path(folder) / "laid out")
        for name, (target, broken) in BREAKS.items():
            if arguments.only not in name:
                continue
            taken, start = 0, time.process_time()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(target, broken)
                try:
                    for taken in take_steps(world, Path(folder), WITHIN):  # noqa: B007
                        pass
                    found[name] = None
                except Exception:  # noqa: BLE001  whatever a step raises: the test fails
                    found[name] = taken + 1
            print(f"{name}: {found[name] or 'not found'} ({time.process_time() - start:.0f} s)", flush=True)
            rows = {**(json.loads(arguments.out.read_bytes())["steps"] if arguments.out.is_file() else {}), **found}
            write_results(arguments.out, {"within": WITHIN, "steps": {name: rows[name] for name in BREAKS if name in rows}})
    return int(None in found.values())


if __name__ == "__main__":
    sys.exit(main())
