"""Whatever happens to a project's files, cache and runs, a command says what it would say in a new project with the same files.

`worlds.changes` is the machine that tries it; `benchmarks/breaks.py` says what the machine finds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import SystemRandom

import pytest

from worlds.breaks import BREAKS
from worlds.changes import SEED, take_steps
from worlds.changing import lay_out
from worlds.places import PROJECT

STEPS = int(os.environ.get("WORKBENCH_STEPS") or 60)


def test_commands_say_what_a_fresh_project_says(tmp_path: Path) -> None:
    seed = SystemRandom().randrange(10**6) if os.environ.get("WORKBENCH_FUZZ_RANDOM") == "1" else SEED
    taken = [*take_steps(lay_out(tmp_path / "laid out"), tmp_path, STEPS, seed)]
    sys.stdout.write(f"{len(taken)} steps of seed {seed}\n")
    assert len(taken) == STEPS


def test_breaks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of `benchmarks/breaks.py` name breaks that there are, each found in time but two, and each break patches a function that there is."""
    measured = json.loads((PROJECT / "benchmarks" / "results" / "breaks.json").read_bytes())
    assert measured["steps"].keys() == BREAKS.keys()
    found = {name: steps for name, steps in measured["steps"].items() if steps is not None}
    assert {*BREAKS} - {*found} == {"the key of scores has no chat template", "the key of a task has no code"}
    assert max(found.values()) <= measured["within"] == 1000
    for target, broken in BREAKS.values():
        monkeypatch.setattr(target, broken)
