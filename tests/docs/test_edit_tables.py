"""The tables of edits in the documents have the numbers of the results files, and say when nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HEAD = {"machine": "2 cores", "command": "python benchmarks/x.py", "commit": "0123456789abcdef", "date": "2026-01-01"}
NAMES = (
    "edit-fixture",
    "edit-merge",
    "edit-speed",
    "edit-scorecard",
    "edit-everyday",
    "edit-stream",
    "edit-stream-starter",
    "edit-sequence",
    "steer",
    "memory-updates",
)
FILES = {"edit-speed": "edit"}


def share(value: float, n: int = 20) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def filled(build: ModuleType, project: Path, name: str, document: dict[str, Any] | None = None) -> str:
    """The block of a document that names it, with a results file or without."""
    if document is not None:
        file = project / "benchmarks" / "results" / f"{FILES.get(name, name)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**HEAD, **document}), "utf-8")
    text = build.fill(f"before\n<!-- {name}:begin -->\nSTALE\n<!-- {name}:end -->\nafter\n", project)
    assert text.startswith("before\n")
    assert text.endswith(f"<!-- {name}:end -->\nafter\n")
    assert "STALE" not in text
    return str(text)


def rows_of(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, the heads first, without the rule."""
    found = []
    for part in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        if rows:
            assert len({len(row) for row in rows}) == 1
            found.append([rows[0], *rows[2:]])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_measured(build: ModuleType, tmp_path: Path, name: str) -> None:
    assert build.MISSING in filled(build, tmp_path, name)


def test_both_fixtures_stand_in_one_table(build: ModuleType, tmp_path: Path) -> None:
    def row(name: str, said: float) -> dict[str, Any]:
        kinds = ("efficacy", "paraphrase", "neighbours", "portability")
        return {"row": name, "scores": {kind: share(said) for kind in kinds}}

    few = {"facts": 1, "rows": [row("base", 0.5)]}
    file = tmp_path / "benchmarks" / "results" / "edit-fixture-prompt.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**HEAD, "numbers": [{"facts": 100, "rows": [row("base", 0.1), row("rome", 0.6)]}]}), "utf-8")
    many = {"facts": 100, "rows": [row("base", 0.0), {"row": "rome", "error": "refused"}]}
    (found,) = rows_of(filled(build, tmp_path, "edit-fixture", {"numbers": [few, many]}))
    assert found[1:] == [["base, not edited", "0, 0, 0, 0", "10, 10, 10, 10"], ["`rome`", "–", "60, 60, 60, 60"]]


def test_merge(build: ModuleType, tmp_path: Path) -> None:
    def one(said: float, kept: int) -> dict[str, Any]:
        survival = {"efficacy": {"kept": kept, "of": 40, **share(kept / 40)}}
        return {"efficacy": share(said), "neighbours": share(0.8), "skills": {"add": share(0.75)}, "survival": survival}

    found = {"control": one(0.02, 1), "merged": one(0.6, 30), "rebased": one(0.8, 39)}
    row = {"method": "memit", "alone": one(0.8, 40), "merges": {"ties": found}}
    document = {
        "facts": 50,
        "file": "cf.json",
        "skills": ["add"],
        "merges": {"ties": {"merge": "ties", "density": 0.2}},
        "rows": [row],
    }
    text = filled(build, tmp_path, "edit-merge", document)
    ((heads, line),) = rows_of(text)
    named = dict(zip(heads, line, strict=False))
    assert line[:4] == ["`memit`", "TIES", "75 [65, 85]", "98 [88, 108]"]
    assert named["add"] == "75 (75)"
    assert "of those right alone, `memit` 80 [70, 90] %" in text
    assert "TIES (`density: 0.2`)" in text


def test_speed(build: ModuleType, tmp_path: Path) -> None:
    def part(values: float) -> dict[str, Any]:
        return {"values": values, "solve": 0.5, "values_peak": 3_000_000, "solve_peak": 2_000_000}

    rows = [{"facts": 10, "memit": part(8.0)}, {"facts": 100, "memit": part(80.0)}]
    starter = {"layer": 7, "inputs": 1536, "statistics": 25.0, "linear": {"memit": {}}, "rows": rows}
    block = {"facts": 2, "values": [4.0, 40.0], "solve": 0.0, "memit_one_by_one": 4.0}
    peer = {"blocks": [block], "ratio": {"memit": {"value": 11.0, "low": 9.0, "high": 12.0}}}
    text = filled(build, tmp_path, "edit-speed", {"starter": starter, "peer": peer})
    (times,) = rows_of(text)
    assert times[1:] == [
        ["`memit`", "starter base", "10", "8.00", "0.50", "3.0"],
        ["`memit`", "starter base", "100", "80.00", "0.50", "3.0"],
    ]
    assert "take 22.0 CPU s a fact on the starter base, where `memit` takes 2.0: 11.0 [9.0, 12.0] times as long." in text
    assert "Starter base: statistics take 25.0 CPU s, once." in text


def test_adapters_beside_memit(build: ModuleType, tmp_path: Path) -> None:
    scores = {"efficacy": share(0.8, 40), "neighbours-strict": share(0.5, 40)}
    against = {
        "efficacy": {"diff": 0.25, "low": -0.1, "high": 0.4},
        "neighbours-strict": {"diff": -0.25, "low": -0.4, "high": -0.1},
    }
    rows = [
        {"row": "base", "scores": scores, "against": {}, "perplexity_change": 0.0},
        {
            "row": "memit",
            "scores": scores,
            "against": {},
            "perplexity_change": 0.01,
            "step": {"edit": "memit"},
            "seconds": 100.0,
            "change": 0.021,
        },
        {
            "row": "adapter",
            "scores": scores,
            "against": against,
            "perplexity_change": -0.02,
            "step": {},
            "seconds": 300.0,
            "change": 0.0,
        },
    ]
    text = filled(build, tmp_path, "edit-scorecard", {"draws": 2, "count": 20, "rows": rows})
    ((heads, *lines),) = rows_of(text)
    assert heads == ["arm", "said", "strict neighbours", "perplexity", "ΔW", "CPU s a fact"]
    assert [line[0] for line in lines] == ["base", "memit", "adapter"]
    assert lines[0][3:] == ["", "", ""]
    assert lines[1][3:] == ["+1.0", "2", "2.5"]
    assert lines[2] == ["adapter", "80 [70, 90]", "50 [40, 60] −", "−2.0", "0", "7.5"]
    assert "2 draws of 20 CounterFact facts (40 in all)" in text
    assert "(../benchmarks/results/edit-scorecard.json)" in text


def test_a_stream_on_the_starter_base(build: ModuleType, tmp_path: Path) -> None:
    point = {"rows": 300, "facts": 90, "latest": 1.0, "all": 0.75, "oldest": 0.5, "perplexity": 30.25}
    windows = [{"both": 3.0, "peak": 2e9, "rows": 100}, {"both": 2.5, "peak": 2.1e9, "rows": 100}]
    counts = {"base": "starter", "layer": 7, "batch": 10, "updates": 210, "rows": 300}
    document = {**counts, "checkpoints": [{"perplexity": 29.0}, point], "windows": windows, "flat": {"both": 0.9, "solve": 1.02}}
    text = filled(build, tmp_path, "edit-stream-starter", document)
    ((_, line),) = rows_of(text)
    assert line == ["300", "90", "100", "75", "50", "30.25"]
    assert "layer 7 of the starter base" in text
    assert "takes 2.500 to 3.000 CPU s" in text
    assert "the last 100 rows take 0.90 times the first full window" in text
    assert "(../benchmarks/results/edit-stream-starter.json)" in text


def test_edits_that_are_solved_batch_after_batch(build: ModuleType, tmp_path: Path) -> None:
    kinds = ("efficacy", "oldest", "paraphrase", "neighbours")
    points = [{"facts": 0, "perplexity": 44.0}, {"facts": 100, **{kind: share(0.5) for kind in kinds}, "perplexity": 46.25}]
    document = {"batch": 10, "layer": 7, "edits": {"memit": {"checkpoints": points}, "alphaedit": {"checkpoints": points}}}
    text = filled(build, tmp_path, "edit-sequence", document)
    ((_, first, second),) = rows_of(text)
    assert first == ["`memit`", "100", *["50 [40, 60]"] * 4, "46.2"]
    assert second[0] == "`alphaedit`"
    assert "Perplexity of other text was 44.0 before" in text


def test_steering_beside_what_it_costs(build: ModuleType, tmp_path: Path) -> None:
    def row(strength: float, share_: float | None, **more: Any) -> dict[str, Any]:
        scores = {"retention": {"acc": {"value": 0.9, "low": 0.8, "high": 0.95}, "n": 60}}
        return {
            "direction": "capitals",
            "strength": strength,
            "share": share_,
            "different_words": 0.75,
            "retention": scores,
            **more,
        }

    rows = [row(0, 0.03), row(2.5, None), row(1, 0.125, **{"with": "add"})]
    text = filled(build, tmp_path, "steer", {"layer": 12, "tokens": 24, "rows": rows})
    ((heads, *lines),) = rows_of(text)
    assert heads == ["direction", "strength", "share", "different words", "retention (n = 60)"]
    assert lines == [
        ["capitals", "0", "3", "75", "90 [80, 95]"],
        ["capitals", "2.5", "none said", "75", "90 [80, 95]"],
        ["capitals, with the LoRA `add`", "1", "12", "75", "90 [80, 95]"],
    ]


def test_facts_that_come_change_and_go(build: ModuleType, tmp_path: Path) -> None:
    def states(*values: float) -> dict[str, Any]:
        return {
            name: {"exact": share(value)} for name, value in zip(("before", "create", "update", "delete"), values, strict=True)
        }

    row = {
        "method": "memory",
        "new answer": states(0.2, 0.8, 0.3, 0.2),
        "true answer": states(0.4, 0.1, 0.7, 0.4),
        "restored": {"texts": 20, "logits": 19},
    }
    text = filled(build, tmp_path, "memory-updates", {"facts": 20, "others": 5, "rows": [row]})
    ((heads, *lines),) = rows_of(text)
    assert heads == ["method", "said", "before", "created", "updated", "deleted"]
    assert lines == [
        ["`memory`", "new answer", "20 [10, 30]", "80 [70, 90]", "30 [20, 40]", "20 [10, 30]"],
        ["`memory`", "true answer", "40 [30, 50]", "10 [0, 20]", "70 [60, 80]", "40 [30, 50]"],
    ]
    assert "bit for bit those from before, of 20 each: 20 texts and 19 vectors of logits with `memory`." in text
