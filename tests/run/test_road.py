"""The road of one TIES run: how many modules of the package it imports, and how many files and functions it enters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from worlds.places import PROJECT
from worlds.tiny import save_finetuned, save_model

RECIPE = """version: 1
base: ./base
bricks: {a: ./a, b: ./b}
steps:
  - {id: mix, merge: ties, bricks: {a: 1.0, b: 1.0}, density: 0.2, lambda: 1.0}
"""
CEILINGS = {"modules": 101, "files": 77, "functions": 591}
"""Lower a number when the road gets shorter. Functions are counted without lambdas, comprehensions and bodies of classes."""
TRACER = """
import json, runpy, sys, threading
package, out = sys.argv[1:3]
entered = set()

def called(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and code.co_name[0] != "<" and code.co_flags & 1:
        entered.add((code.co_filename, code.co_firstlineno))

sys.argv = ["workbench", "run", "ties.yaml", "--runs-dir", "runs"]
threading.setprofile(called)
sys.setprofile(called)
try:
    runpy.run_module("workbench", run_name="__main__")
finally:
    sys.setprofile(None)
    modules = [name for name in sys.modules if name.split(".")[0] == "workbench"]
    counts = {"modules": len(modules), "files": len({file for file, _ in entered}), "functions": len(entered)}
    with open(out, "w") as file:
        json.dump(counts, file)
"""


def test_a_ties_run_stays_on_its_road(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    for seed, name in enumerate(("a", "b"), 1):
        save_finetuned(base, tmp_path / name, seed=seed)
    (tmp_path / "ties.yaml").write_text(RECIPE, "utf-8")
    # A process of its own, because the test's has imported other modules.
    done = subprocess.run(
        [sys.executable, "-c", TRACER, f"{PROJECT / 'workbench'}{os.sep}", str(tmp_path / "counts.json")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text("utf-8"))
    assert {name: counts[name] for name in CEILINGS if counts[name] > CEILINGS[name]} == {}, counts
