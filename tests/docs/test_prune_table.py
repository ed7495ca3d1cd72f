"""The table and the figure of pruned models: one row for each arm, and nothing where nothing is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

HEAD = {"machine": "2 cores", "command": "python benchmarks/x.py", "commit": "0123456789abcdef", "date": "2026-01-01"}


def state(perplexity: float, value: float, **more: Any) -> dict[str, Any]:
    return {"perplexity": perplexity, "retention": {"n": 200, "value": value, "low": value - 0.1, "high": value + 0.1}, **more}


def document() -> dict[str, Any]:
    difference = {"diff": -0.2, "low": -0.25, "high": -0.15}
    rows = [
        {
            "arm": arm,
            "gone": [2, 5],
            "pruned": state(1234.5, 0.4),
            "trained": state(50.0, 0.7, difference=difference),
            "training_seconds": 600,
        }
        for arm in ("influence", "last", "random-0")
    ]
    sizes = {"layers": 8, "steps": 10, "batch_size": 4, "length": 64, "texts": {"calibration": 4, "held_out": 8}}
    return {**HEAD, "base": "the starter base", "share": 0.25, **sizes, "before": state(20.0, 0.9), "rows": rows}


def test_rows(build: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "prune.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(document()))
    block = build.BLOCKS["grow-prune"]
    lines = block(tmp_path).split("\n")
    assert "| the model before |  | 20.0 | 90 [80, 100] |  |  |  |  |" in lines
    cells = "2, 5 | 1,234 | 40 [30, 50] | 50.0 | 70 [60, 80] | −20.0 [−25.0, −15.0] | 10 |"
    assert f"| `by: influence` | {cells}" in lines
    assert f"| the last layers | {cells}" in lines
    assert lines[0].endswith("(growing-pruned.svg)")
    assert lines[-1].startswith("The starter base without 2 of its 8 layers;")
    assert block(tmp_path / "none") == "Not measured yet."


def test_neurons(build: ModuleType, tmp_path: Path) -> None:
    """Without training there are no columns for it."""
    path = tmp_path / "benchmarks" / "results" / "prune-neurons.json"
    path.parent.mkdir(parents=True)
    row = {"arm": "fitted", "pruned": state(40.0, 0.7, other=60.0), "trained": state(30.0, 0.8, other=50.0)}
    found = {
        **HEAD,
        "base": "the starter base",
        "share": 0.25,
        "steps": 9,
        "batch_size": 4,
        "length": 64,
        "calibration": 32,
        "held_out": 8,
    }
    found |= {"before": state(20.0, 0.9, other=25.0), "rows": [row]}
    for steps, more, blank in ((9, " 30.0 | 50.0 | 80 [70, 90] |", "  |  |  |"), (0, "", "")):
        path.write_text(json.dumps({**found, "steps": steps}))
        lines = build.BLOCKS["grow-prune-neurons"](tmp_path).split("\n")
        assert f"| the model before | 20.0 | 25.0 | 90 [80, 100] |{blank}" in lines
        assert f"| `grow: prune` | 40.0 | 60.0 | 70 [60, 80] |{more}" in lines
        assert ("Training: 9 steps" in lines[-1]) == bool(steps)
    assert lines[-1].startswith("The starter base without 25 % of the neurons of every layer")


def test_figure(build: ModuleType) -> None:
    """Dots of lower perplexity lie further left, and those of trained models have an interval."""
    drawn = build.prune_figure.figure(document())
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="(\d+)" r="5"', drawn)][2:]
    assert len(circles) == 2 * 2 * 3
    pruned, trained = circles[:2]
    assert trained[0] < pruned[0]
    assert trained[1] == pruned[1]
    assert drawn.count("M") > 12
    for arm in ("influence", "last", "random-0"):
        assert f">{arm}</text>" in drawn
