"""Configurations of equal weights: a recipe keeps its name beside a control or another recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from worlds.report_page import render
from worlds.stored_scores import ADD, ALONE, AVERAGE, BASE, MEAN, NOOP, SORT, TIES, TWIN, Values, of, right, stored

from workbench.cli._comparison import scores_table
from workbench.compare.compare import compare
from workbench.scores.store import Configuration, ScoreStore


def lineup(*configurations: Configuration) -> Values:
    shares = {"0": (0.0, 0.1), "1": (0.9, 0.1), "2": (0.0, 0.9), "3": (0.5, 0.5), "4": (0.7, 0.6)}
    return {c: dict(zip(("add", "sort"), map(right, shares[c.digest[0]]), strict=True)) for c in configurations}


def compared(tmp_path: Path, *configurations: Configuration, baseline: str | None = None) -> dict[str, Any]:
    store = ScoreStore(tmp_path / "scores")
    # One file of scores a digest: those of equal weights are read under the names that are asked for, as `scoring.stored` does.
    found = {s.configuration.digest: s for s in stored(store, lineup(*configurations), owners={"add": "add", "sort": "sort"})}
    return compare(store, [found[c.digest].called(c) for c in configurations], baseline=baseline).to_dict()


ALL = (BASE, ADD, SORT, AVERAGE)


def test_a_recipe_of_a_controls_weights_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = compared(tmp_path, *ALL, MEAN, TIES)
    assert [(c["name"], c["role"]) for c in document["configurations"]] == [
        ("base", "base"),
        ("add", "brick"),
        ("sort", "brick"),
        ("my-average", "configuration"),
        ("ties", "configuration"),
    ]
    mine = of(document, "my-average")
    assert mine["aliases"] == ["average"]
    assert mine["roles"] == ["average", "configuration"]
    assert mine["recipe"] == "recipes/my-average.yaml"
    rows = [(r["configuration"], r["role"]) for r in document["rows"] if r["task"] == "add"]
    assert rows == [("add", "brick"), ("sort", "brick"), ("my-average", "configuration"), ("ties", "configuration")]
    assert document["family"]["size"] == 4
    assert document["family"]["text"] == "primary metric of 2 tasks x 2 configurations against base; 2 controls tested separately"
    assert not [w for w in document["warnings"] if "Missing controls" in w]
    page, text, _ = (p.read_text("utf-8") for p in render(document, tmp_path / "report"))
    assert "2 configurations compared with base" in page
    assert "add + sort, same weights as average" in page
    assert "configuration, same weights as average" in text
    assert "No plain average" not in page + text


def test_the_terminal_names_what_has_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ScoreStore(tmp_path)
    found = {s.configuration.digest: s for s in stored(store, lineup(*ALL, MEAN, TIES))}
    scores_table(compare(store, [found[c.digest].called(c) for c in (*ALL, MEAN, TIES)]), [])
    said = capsys.readouterr()
    assert "my-average: same weights as average" in said.err
    assert "my-average" in said.out


def test_two_recipes_of_equal_weights_are_both_shown(tmp_path: Path) -> None:
    document = compared(tmp_path, *ALL, TIES, TWIN, MEAN)
    names = [c["name"] for c in document["configurations"] if c["role"] == "configuration"]
    assert names == ["ties", "ties-again", "my-average"]
    assert of(document, "ties")["aliases"] == ["ties-again"]
    assert of(document, "ties-again")["aliases"] == ["ties"]
    assert of(document, "ties-again")["recipe"] == "recipes/ties-again.yaml"
    assert of(document, "ties-again")["kept"] == of(document, "ties")["kept"]
    ties, again = (
        [{**r, "configuration": ""} for r in document["rows"] if r["configuration"] == n] for n in ("ties", "ties-again")
    )
    assert len(ties) == 2
    assert ties == again
    assert document["family"]["size"] == 4  # equal weights are tested once
    assert len(document["flips"]["ties-again"]) == len(document["flips"]["ties"]) > 0
    assert "3 configurations compared with base" in render(document, tmp_path / "report")[0].read_text("utf-8")


def test_a_recipe_of_a_bricks_weights_leaves_the_brick_in_the_matrix(tmp_path: Path) -> None:
    plain, document = compared(tmp_path / "a", *ALL, TIES), compared(tmp_path / "b", *ALL, TIES, ALONE)
    assert of(document, "just-add")["aliases"] == ["add"]
    assert of(document, "just-add")["kept"] == {}  # it is its own parent
    assert document["interference"] == plain["interference"]
    assert document["interference"]["bricks"] == ["add", "sort"]
    assert of(document, "ties")["kept"] == of(plain, "ties")["kept"]
    assert not [w for w in document["warnings"] if "Missing controls" in w or "its owner" in w]
    other = compared(tmp_path / "c", *ALL, TIES, ALONE, baseline="average")
    assert other["interference"]["diff"] == plain["interference"]["diff"]


def test_a_recipe_of_the_bases_weights_stands_beside_the_base(tmp_path: Path) -> None:
    document = compared(tmp_path, *ALL, TIES, NOOP)
    assert document["baseline"] == "base"
    assert document["configurations"][0]["name"] == "base"
    assert of(document, "noop")["role"] == "configuration"
    assert {r["verdict"] for r in document["rows"] if r["configuration"] == "noop"} == {"no item changed"}
    assert document["family"]["size"] == 2
    page = render(document, tmp_path / "report")[0].read_text("utf-8")
    assert "2 configurations compared with base" in page


def test_a_control_that_is_the_baseline_keeps_its_name(tmp_path: Path) -> None:
    document = compared(tmp_path, *ALL, MEAN, TIES, baseline="average")
    assert document["baseline"] == "average"
    assert of(document, "average")["role"] == "average"
    assert {r["verdict"] for r in document["rows"] if r["configuration"] == "my-average"} == {"no item changed"}
    mine = compared(tmp_path / "b", *ALL, MEAN, TIES, TWIN, baseline="ties-again")
    assert mine["baseline"] == "ties-again"
    assert {r["verdict"] for r in mine["rows"] if r["configuration"] == "ties"} == {"no item changed"}


def test_a_task_of_two_suites_has_two_names_and_its_own_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each suite has its own metric, role and items; only what both have is named after the suite."""
    store = ScoreStore(tmp_path / "scores")
    one = {BASE: {"add": right(0.1), "sort": right(0.5)}, TIES: {"add": right(0.9), "sort": right(0.5)}}
    other = {BASE: {"add": right(0.8)}, TIES: {"add": right(0.3)}}
    scores = [*stored(store, one), *stored(store, other, suite="strict", roles={"add": "guarded"})]
    document = compare(store, scores).to_dict()
    assert [(t["task"], t["suite"], t["role"]) for t in document["tasks"]] == [
        ("add (toy)", "toy", "skill"),
        ("sort", "toy", "skill"),
        ("add (strict)", "strict", "guarded"),
    ]
    verdicts = {(row["configuration"], row["task"]): row["verdict"] for row in document["rows"]}
    assert verdicts == {("ties", "add (toy)"): "better", ("ties", "sort"): "no item changed", ("ties", "add (strict)"): "worse"}
    values = document["configurations"][1]["scores"]
    assert [round(values[task]["value"], 2) for task in values] == [0.9, 0.5, 0.3]
    scores_table(compare(store, scores), scores)
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ties"))
    assert [float(cell) for cell in re.findall(r"([\d.]+) \[", shown)][1:] == [90, 50, 30]
