"""The tables of edits in the documents have the numbers of the results files, and say when nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HEAD = {"machine": "2 cores", "command": "python benchmarks/x.py", "commit": "0123456789abcdef", "date": "2026-01-01"}
NAMES = (
    "edit-methods",
    "edit-methods-alone",
    "edit-fixture",
    "edit-fixture-prompt",
    "edit-merge",
    "edit-speed",
    "edit-adapter",
    "edits",
    "edit-stream",
    "edit-stream-starter",
    "steer",
    "memory-updates",
)
FILES = {"edit-speed": "edit", "edit-methods-alone": "edit-methods", "edits": "edit-adapter"}


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


def methods_document() -> dict[str, Any]:
    base = {"row": "base", "scores": {"efficacy": share(0.1), "neighbours": share(0.9), "preferred": share(0.2), "entropy": {"value": 5.5}},
            "retention": {"score": share(0.6)}, "perplexity": {"value": 30.0}, "seconds": {}}  # fmt: skip
    memit = {
        "row": "memit", "scores": {"efficacy": share(0.8), "neighbours": share(0.7), "preferred": share(0.9), "entropy": {"value": 5.25}},
        "retention": {"score": share(0.5), "diff": -0.1, "low": -0.2, "high": -0.02, "low_adj": -0.25, "high_adj": -0.01, "verdict": "worse"},
        "perplexity": {"value": 33.0, "change": {"value": 0.1, "low": 0.05, "high": None}}, "layers": [7], "positions": {"7": "subject_last"},
        "skipped": 2, "updates": [{"tensor": "t", "rank": 20, "relative": 0.1234}],
        "seconds": {"load": 9.0, "statistics": 4.0, "trace": 1.0, "sweep": 2.0, "values at layer 7": 10.0, "refining": 3.0, "solve": 0.5},
        "shared": {"statistics": "rome"},
    }  # fmt: skip
    grace = {"row": "grace", "scores": {"efficacy": share(0.9), "neighbours": share(0.9)}, "retention": {"score": share(0.6)}, "layers": 20,
             "seconds": {"training": 7.0}}  # fmt: skip
    prompts = {"paraphrases": 20, "neighbours": 20, "portability": 0}
    return {"facts": 20, "file": "cf.json", "prompts": prompts, "limit": None, "dtype": "bfloat16",
            "rows": [base, memit, grace, {"row": "rome", "error": "no value at layer 7"}]}  # fmt: skip


def test_methods(build: ModuleType, tmp_path: Path) -> None:
    text = filled(build, tmp_path, "edit-methods", methods_document())
    strict, soft, cost = rows_of(text)
    assert strict[0] == ["edit", "efficacy", "neighbours unchanged", "retention, difference"]
    assert strict[1] == ["base, not edited", "10 [0, 20]", "90 [80, 100]", ""]
    assert strict[2] == ["`memit`", "80 [70, 90]", "70 [60, 80]", "−10.0 [−25.0, −1.0] −"]
    assert strict[3][0] == "`grace`"
    assert [row[-2:] for row in soft[1:]] == [["5.50", "30.0"], ["5.25", "+10.0 %"], ["", ""]]
    assert cost[1] == ["`memit`", "7", "20", "0.123", "2", "4.0", "13.0", "3.0", "0.5"]
    assert cost[2] == ["`grace`", "20", "", "", "", "", "7.0", "", ""]
    assert "Refused: `rome`: no value at layer 7." in text
    assert "Measured by `python benchmarks/x.py` on 2 cores, commit 0123456789ab." in text
    assert "took where they were computed" in text


def test_single_facts_and_curve(build: ModuleType, tmp_path: Path) -> None:
    scores = {"efficacy": share(0.5), "neighbours": share(0.4)}
    single = {"rows": {"rome": {"facts": 20, "seconds": 50.0, "failed": 1, "scores": scores}}, "before": {"efficacy": share(0.1)}}
    curve = [
        {"row": "base", "fields": {}, "scores": scores},
        {"row": "memit", "fields": {"lambda": 0.3}, "preserved": 0, "scores": scores},
        {"row": "memit", "fields": {"preserve": "preserve.jsonl", "preserve_weight": 10.0}, "preserved": 40, "scores": scores},
    ]
    alone, traded = rows_of(
        filled(build, tmp_path, "edit-methods-alone", {**methods_document(), "single": single, "curve": curve})
    )
    assert alone[1] == ["base, not edited", "10 [0, 20]", "", "", ""]
    assert alone[2] == ["`rome`", "50 [40, 60]", "", "40 [30, 50]", "1"]
    assert [row[:2] for row in traded[1:]] == [
        ["base, not edited", ""],
        ["`memit`", "`lambda: 0.3`"],
        ["`memit`", "`preserve_weight: 10.0`, 40 other prompts preserved"],
    ]


def test_fixture_has_a_column_for_each_number_of_facts(build: ModuleType, tmp_path: Path) -> None:
    few = {
        "facts": 1,
        "rows": [{"row": "base", "scores": {"efficacy": share(0.0)}}, {"row": "rome", "scores": {"efficacy": share(0.9)}}],
    }
    many = {"facts": 1000, "rows": [{"row": "rome", "error": "refused"}, {"row": "memit", "scores": {"efficacy": share(0.7)}}]}
    (efficacy,) = rows_of(filled(build, tmp_path, "edit-fixture", {"numbers": [few, many]}))
    assert efficacy == [
        ["efficacy", "1 fact", "1000 facts"],
        ["base, not edited", "0 [−10, 10]", ""],
        ["`rome`", "90 [80, 100]", "–"],
        ["`memit`", "", "70 [60, 80]"],
    ]


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
    assert line[:5] == ["`memit`", "TIES", "2 [−8, 12]", "30 of 40 (75 [65, 85])", "39 of 40 (98 [88, 108])"]
    assert named["add"] == "75 (75)"
    assert "right alone: `memit` 80 [70, 90] %" in text
    assert "TIES (`density: 0.2`)" in text


def test_speed(build: ModuleType, tmp_path: Path) -> None:
    def part(values: float) -> dict[str, Any]:
        return {"values": values, "solve": 0.5, "values_peak": 3_000_000, "solve_peak": 2_000_000}

    linear = {
        "rome": {
            "values": 1.02,
            "solve": 0.3,
            "both": 0.97,
            "values_bytes_a_fact": 10,
            "solve_bytes_a_fact": 12_300,
            "at_most": 1.1,
        }
    }
    starter = {"layer": 7, "inputs": 1536, "covariance_bytes": 18_874_368, "statistics": 25.0, "linear": linear,
               "rows": [{"facts": 10, "rome": part(8.0)}, {"facts": 100, "rome": part(80.0)}]}  # fmt: skip
    block = {
        "facts": 2,
        "values": [4.0, 40.0],
        "steps": [9, 9],
        "top": [2, 2],
        "solve": 0.0,
        "rome": 2.0,
        "memit_one_by_one": 4.0,
        "memit_joint": 2.0,
    }
    ratio = {name: {"value": 10.0, "low": 9.0, "high": 11.0} for name in ("values", "rome", "memit")}
    peer = {"layer": 7, "facts": 2, "blocks": [block], "ratio": ratio, "cosine": {"least": 0.99, "median": 0.999}}
    text = filled(build, tmp_path, "edit-speed", {"starter": starter, "peer": peer})
    times, ratios = rows_of(text)
    assert times[1:] == [
        ["`rome`", "starter base", "10", "8.00", "0.50", "3.0", "2.0"],
        ["`rome`", "starter base", "100", "80.00", "0.50", "3.0", "2.0"],
    ]
    assert ratios[1:] == [
        ["values", "2.00", "20.00", "10.0 [9.0, 11.0]"],
        ["values and ROME's solve", "2.00", "21.00", "10.0 [9.0, 11.0]"],
        ["values and MEMIT's solve", "2.00", "22.00", "10.0 [9.0, 11.0]"],
    ]
    assert "100 facts take 0.97 times what 10 take" in text
    assert "grows by 12.3 kB a fact" in text


def test_adapters_beside_memit(build: ModuleType, tmp_path: Path) -> None:
    scores = {"efficacy": share(0.8, 40), "neighbours-strict": share(0.5, 40)}
    against = {task: {"diff": 0.25, "low": -0.1, "high": 0.4} for task in scores}
    rows = [
        {"row": "base", "scores": scores, "against": {}, "perplexity_change": 0.0},
        {"row": "memit", "scores": scores, "against": {}, "perplexity_change": 0.01, "step": {"edit": "memit"}, "seconds": 100.0},
        {"row": "adapter", "scores": scores, "against": against, "perplexity_change": -0.02, "step": {}, "seconds": 300.0},
    ]
    text = filled(build, tmp_path, "edit-adapter", {"draws": 2, "count": 20, "rows": rows})
    ((heads, *lines),) = rows_of(text)
    assert heads == ["arm", "said", "strict neighbours", "perplexity", "CPU s a fact"]
    assert [line[0] for line in lines] == ["base", "memit", "adapter", ""]
    assert lines[0][3:] == ["", ""]
    assert lines[1][3:] == ["+1.0", "2.5"]
    assert lines[2][3:] == ["−2.0", "7.5"]
    assert lines[3] == ["", "+25.0 [−10.0, +40.0]", "+25.0 [−10.0, +40.0]", "", ""]
    assert "2 draws of 20 CounterFact facts (40 in all)" in text
    assert "(../benchmarks/results/edit-adapter.json)" in text


def test_the_sentence_of_the_readme(build: ModuleType, tmp_path: Path) -> None:
    def row(name: str, *values: float) -> dict[str, Any]:
        tasks = ("efficacy", "paraphrase", "neighbours-strict", "generated")
        return {"row": name, "scores": {task: share(value) for task, value in zip(tasks, values, strict=True)}}

    rows = [row("base", 0.0, 0.0, 1.0, 0.0), row("memit", 1.0, 0.5, 0.66, 0.26), row("memory", 0.95, 0.5, 0.98, 0.9)]
    text = filled(build, tmp_path, "edits", {"draws": 3, "count": 20, "rows": rows})
    assert "Edits of 60 CounterFact facts" in text
    assert "answer and stop): `memit` 100, 50, 66, 26; facts in the prompt 95, 50, 98, 90 (" in text


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
    assert "the last window takes 0.90 times the first full one, its solve 1.02 times" in text
    assert "(../benchmarks/results/edit-stream-starter.json)" in text


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
    assert "20 texts and 19 vectors of logits of `memory` (of 20 each) are bit for bit those from before" in text
