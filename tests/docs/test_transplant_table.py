"""The table of skills that are moved in part: shares kept, marks and differences."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

HEAD = {"machine": "2 cores", "command": "python benchmarks/x.py", "commit": "0123456789abcdef", "date": "2026-01-01"}


def row(way: str, value: float, share: float | None = None, **gaps: tuple[float, float, float]) -> dict[str, Any]:
    moved = {"base": 0.0, "whole": 1.0, "attention": 0.25}.get(way, 0.4)
    found = {
        "skill": "one",
        "way": way,
        "share": share,
        "moved": moved,
        "seed": 0,
        "n": 40,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
    }
    return found | {key: dict(zip(("diff", "low", "high"), gap, strict=True)) for key, gap in gaps.items()}


def test_rows(build: ModuleType, tmp_path: Path) -> None:
    rows = [
        row("base", 0.1),
        row("whole", 0.9),
        row("attention", 0.3, against_whole=(-0.6, -0.7, -0.5)),
        row("mask", 0.7, 0.25, against_whole=(-0.2, -0.45, 0.05), against_random=(0.25, 0.1, 0.4)),
        row("random mask", 0.45, 0.25, against_whole=(-0.5, -0.6, -0.4)),
    ]
    path = tmp_path / "benchmarks" / "results" / "transplant.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**HEAD, "skills": ["one"], "rows": rows}))
    block = build.BLOCKS["neurons-transplant"]
    lines = block(tmp_path).split("\n")
    assert "| whole |  | 100 % | 90 [80, 100] | 100 |" in lines
    assert "| attention |  | 25 % | 30 [20, 40] | 25 |" in lines
    assert "| mask | 25 % | 40 % | 70 [60, 80] * | 75 |" in lines
    assert "| random mask | 25 % | 40 % | 45 [35, 55] | 44 |" in lines
    assert "| mask | 25 % | +25.0 [+10.0, +40.0] |" in lines
    assert sum(line.startswith("| mask ") for line in lines) == 2
    assert lines[-1].endswith("(../benchmarks/results/transplant.json).")
    assert block(tmp_path / "none") == "Not measured yet."
