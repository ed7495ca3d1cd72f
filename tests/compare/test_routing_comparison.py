"""Routed configurations in comparisons: who answered, and beside the best merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from worlds.report_page import Page, rendered
from worlds.toy_scores import ADD, AVERAGE, BASE, MERGE, SHARES, SORT, SUITE, stored

from workbench.compare.compare import Comparison, compare
from workbench.compare.routing import advice
from workbench.scores.store import Configuration, ScoreStore

ROUTED = Configuration("5" * 32, "routed", "configuration", ("add", "sort"), "recipes/routed.yaml")
N = 240


def compared(folder: Path, right: tuple[float, float], weak: tuple[float, float] = (0.75, 0.45)) -> Comparison:
    """Compare a routed configuration with a merge, from the shares of right answers on `add` and `sort`."""
    rank = np.random.default_rng(0).permuted(np.tile(np.arange(N), (3, 1)), axis=1)
    shares = {**SHARES, MERGE: (*weak, 0.8), ROUTED: (*right, 0.8)}
    values = {c: [(rank[t] < share * N).astype(float).tolist() for t, share in enumerate(line)] for c, line in shares.items()}
    answered = {
        "add": [["add"]] * 228 + [["base"]] * 12,
        "sort": [["sort"]] * 192 + [["add"]] * 24 + [["base"]] * 12 + [["sort", "base"]] * 12,
        "facts": [["base"]] * 216 + [["sort"]] * 24,
    }
    store = ScoreStore(folder / "scores")
    return compare(store, stored(store, values, routed={"routed": answered}, suite=SUITE.model_copy(update={"drawn": "items"})))


def test_who_answered(tmp_path: Path) -> None:
    routing = compared(tmp_path, (1.0, 0.9)).to_dict()["routing"]
    add, sort, facts = routing["tasks"]
    assert (add["owner"], sort["owner"], facts["owner"]) == ("add", "sort", None)
    assert sort["answered_by"] == {"sort": 192, "add": 24, "base": 12, "sort and base": 12}
    assert [add[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0.95, 0.05, 0])
    assert [sort[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0.8, 0.05, 0.1])
    assert [facts[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0, 0.9, 0.1])
    assert facts["other"]["low"] < 0.1 < facts["other"]["high"]


def test_a_merge_that_the_brick_is_part_of_is_its_own(tmp_path: Path) -> None:
    """Labels are those of routed merges; the one that holds the task's brick is no false routing."""
    members = {"both": ("both-recipe", "add", "sort"), "other": ("other-recipe", "spell")}
    routed = Configuration(
        "5" * 32, "routed", "configuration", ("add", "sort", "spell"), bricks={"both": 1, "other": 1}, members=members
    )
    values = {c: [[0.0, 1.0] * (N // 2) for _ in line] for c, line in {**SHARES, routed: (1, 1, 1)}.items()}
    answered = {
        "add": [["both"]] * 228 + [["other"]] * 12,
        "sort": [["both", "base"]] * 12 + [["both"]] * 228,
        "facts": [["base"]] * 216 + [["both"]] * 24,
    }
    store = ScoreStore(tmp_path / "scores")
    found = compare(store, stored(store, values, routed={"routed": answered})).to_dict()["routing"]
    add, sort, facts = found["tasks"]
    assert [add[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0.95, 0, 0.05])
    assert [sort[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0.95, 0, 0])
    assert [facts[k]["value"] for k in ("own", "base", "other")] == pytest.approx([0, 0.9, 0.1])
    assert {row["bricks"] for row in found["beside"]} == {2}


def test_a_routed_model_above_every_merge(tmp_path: Path) -> None:
    comparison = compared(tmp_path, (1.0, 0.9))
    (row,) = comparison.to_dict()["routing"]["beside"]
    assert (row["merge"], row["merges"], row["verdict"], row["bricks"]) == ("merge", 2, "better", 2)
    assert row["value"] == pytest.approx(0.95, abs=0.003)
    assert row["merge_value"] == pytest.approx(0.6, abs=0.003)
    assert row["diff"] == pytest.approx(row["value"] - row["merge_value"])
    assert 0 < row["low"] < row["diff"] < row["high"]
    page, text = rendered(comparison.to_dict(), tmp_path)
    assert r"Route: routed scores +35.0 \[" in text
    assert "keeps 100 % of the single bricks' skills" in text
    cells = Page(page).tables["routed"]
    assert cells[2][:4] == ["routed", "sort", "sort", "240"]
    assert cells[3][4] == "–", "no brick owns facts"
    assert cells[3][7] == "base 216, sort 24"


@pytest.mark.parametrize(
    ("right", "weak", "verdict", "start"),
    [
        ((0.5, 0.3), (0.95, 0.9), "worse", "Merge: routed scores −"),
        ((0.75, 0.45), (0.75, 0.45), "equivalent", "Merge: routed and merge"),
        ((0.755, 0.445), (0.75, 0.45), "equivalent", "Merge: routed and merge, the best of 2 merges, are equivalent"),
        ((0.80, 0.42), (0.75, 0.45), "cannot tell", "Merge or route cannot be told"),
    ],
)
def test_other_verdicts(right: tuple[float, float], weak: tuple[float, float], verdict: str, start: str, tmp_path: Path) -> None:
    routing = compared(tmp_path, right, weak).routing
    assert routing
    (row,) = routing.beside
    assert row.verdict == verdict
    assert advice(row).startswith(start)


def test_without_routed_configurations_nothing_is_said(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    values = {c: [[1.0] * 40] * 3 for c in (BASE, ADD, SORT, AVERAGE, MERGE)}
    comparison = compare(store, stored(store, values, clusters=10))
    assert "routing" not in comparison.to_dict()
    page, text = rendered(comparison.to_dict(), tmp_path)
    assert 'id="routing"' not in page
    assert "## Routing" not in text


def test_a_routed_model_without_a_merge_has_no_advice(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    values = {c: [[1.0] * 40] * 3 for c in (BASE, ADD, SORT, ROUTED)}
    answered = {"routed": {t: [["add"]] * 40 for t in ("add", "sort", "facts")}}
    routing = compare(store, stored(store, values, clusters=10, routed=answered)).to_dict()["routing"]
    assert routing["beside"] == []
    assert routing["tasks"][1]["other"]["value"] == 1


def test_a_merge_of_other_bricks_is_no_rival(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    foreign = Configuration("6" * 32, "foreign", "configuration", ("red", "blue"))
    alone = Configuration("7" * 32, "tuned", "configuration", ("add",))
    half = [1.0, 0.0] * 20
    values = {
        c: [[1.0] * 40] * 3 if c in (foreign, alone) else [half] * 3 for c in (BASE, ADD, SORT, MERGE, ROUTED, foreign, alone)
    }
    answered = {"routed": {t: [["add"]] * 40 for t in ("add", "sort", "facts")}}
    (row,) = compare(store, stored(store, values, clusters=10, routed=answered)).to_dict()["routing"]["beside"]
    assert (row["merge"], row["merges"]) == ("merge", 1)
