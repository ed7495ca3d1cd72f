"""The table of carried bricks: scores with intervals, means over seeds with ranges, kept shares, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

HEAD = {"machine": "2 cores", "command": "python benchmarks/x.py", "commit": "0123456789abcdef", "date": "2026-01-01"}


def row(way: str, value: float, seed: int | None = None, kept: float | None = None, **more: Any) -> dict[str, Any]:
    scored = {"n": 40, "value": value, "low": value - 0.1, "high": value + 0.1}
    return {
        "sibling": "short",
        "skill": "one",
        "way": way,
        "seed": seed,
        **scored,
        **({} if kept is None else {"kept": kept}),
        **more,
    }


def test_rows(build: ModuleType, tmp_path: Path) -> None:
    match = {"matched": 0.62, "chance": 0.11, "above": True}
    rows = [
        row("base", 0.1),
        row("brick", 0.9),
        row("sibling", 0.1),
        row("skip", 0.3, kept=0.25, **match),
        row("map, ridge", 0.1, kept=0.0, **{**match, "matched": 0.12, "above": False}),
        *(row("from the transplant", value, seed, kept=value - 0.1) for seed, value in enumerate((0.5, 0.6, 0.7))),
        *(row("anew", value, seed, kept=value - 0.1) for seed, value in enumerate((0.4, 0.5))),
    ]
    path = tmp_path / "benchmarks" / "results" / "transplant-bricks.json"
    path.parent.mkdir(parents=True)
    document = {**HEAD, "skills": ["one"], "siblings": ["short"], "seeds": 3, "steps": 30, "texts": 200, "rows": rows}
    path.write_text(json.dumps(document))
    block = build.BLOCKS["transplant-bricks"]
    lines = block(tmp_path).split("\n")
    assert "| short | the brick on its base |  | 90 [80, 100] |  |" in lines
    assert "| short | `skip` | 0.62 (0.11) | 30 [20, 40] | 25 |" in lines
    assert "| short | `map, ridge` (1 refused) | 0.12 (0.11) | 10 [0, 20] | 0 |" in lines
    assert "| short | best way, trained |  | 60 (50–70) | 50 |" in lines
    assert "| short | new adapter, trained |  | 45 (40–50) | 35 |" in lines
    assert lines[-1].endswith("(../benchmarks/results/transplant-bricks.json).")
    assert block(tmp_path / "none") == "Not measured yet."
