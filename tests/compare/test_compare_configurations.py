"""A comparison describes configurations: correction for chance, ratios to parents, intervals of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.report_page import render
from worlds.stored_scores import ADD, BASE, FOUR, TIES, Row, of, right, stored

from workbench.cli._comparison import scores_table
from workbench.compare.compare import Comparison, compare
from workbench.compare.kept import kept_of
from workbench.compare.tables import Table
from workbench.scores.statistics import expanded_tail, score_interval
from workbench.scores.store import ScoreStore
from workbench.scores.suite import Suite

# Correction for chance


@pytest.mark.parametrize(
    ("items", "chance"),
    [
        ([{"choices": FOUR, "gold": 0}] * 240, 0.25),
        ([{"choices": FOUR[:2], "gold": 0}] * 60 + [{"choices": FOUR, "gold": 0}] * 180, 0.3125),
        ([{"choices": FOUR, "gold": [0, 2]}] * 240, 0.5),
        ([{"choices": FOUR, "gold": "[1, 3]"}] * 120 + [{"choices": FOUR, "gold": "a text"}] * 120, 0.375),
        ([{"choices": FOUR, "gold": -100}] * 120 + [{"choices": FOUR, "gold": 3}] * 120, 0.125),
    ],
)
@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_norm,flexible"])
def test_chance_is_that_of_guessing_among_the_items_choices(tmp_path: Path, items: list[Row], chance: float, metric: str) -> None:
    store = ScoreStore(tmp_path)
    values = {BASE: {"pick": right(0.5)}, TIES: {"pick": right(0.7)}}
    document = compare(store, stored(store, values, kind="multiple_choice", metric=metric, items=items)).to_dict()
    assert document["tasks"][0]["chance"] == pytest.approx(chance)
    assert of(document, "ties")["mean"]["value"] == pytest.approx((0.7 - chance) / (1 - chance))
    assert of(document, "ties")["scores"]["pick"]["corrected"] == pytest.approx((0.7 - chance) / (1 - chance))
    assert not any("corrected" in w for w in document["warnings"])


@pytest.mark.parametrize("given", [0.0, 0.4])
def test_the_suites_chance_wins(tmp_path: Path, given: float) -> None:
    store = ScoreStore(tmp_path)
    items = [{"choices": FOUR, "gold": 0}] * 240
    values = {BASE: {"pick": right(0.5)}, TIES: {"pick": right(0.7)}}
    scores = stored(store, values, kind="multiple_choice", metric="acc", items=items, chance={"pick": given})
    document = compare(store, scores).to_dict()
    assert document["tasks"][0]["chance"] == given
    assert of(document, "ties")["mean"]["value"] == pytest.approx((0.7 - given) / (1 - given))
    assert not any("corrected" in w for w in document["warnings"])


def test_chance_is_no_part_of_the_plan(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    values = {BASE: {"pick": right(0.5)}}
    plans = {stored(store, values, kind="multiple_choice", metric="acc", chance=c)[0].plan for c in ({}, {"pick": 0.25})}
    assert len(plans) == 1


@pytest.mark.parametrize(
    ("kind", "metric", "choices", "chance"),
    [
        ("generate_until", "em", FOUR, 0.0),  # text, whatever the item says beside
        ("multiple_choice", "exact_match", FOUR, 0.0),  # whether the choice would be written unasked
        ("multiple_choice", "acc", None, None),
        ("multiple_choice", "acc", ["only"], None),  # guessing is always right
        ("multiple_choice", "mass", FOUR, None),
    ],
)
def test_other_metrics_have_no_guessing_by_choices(
    tmp_path: Path, kind: str, metric: str, choices: Any, chance: float | None
) -> None:
    store = ScoreStore(tmp_path)
    values = {BASE: {"pick": right(0.5)}, TIES: {"pick": right(0.7)}}
    document = compare(
        store, stored(store, values, kind=kind, metric=metric, items=[{"choices": choices, "gold": 0}] * 240)
    ).to_dict()
    assert document["tasks"][0]["chance"] == chance
    assert of(document, "ties")["mean"]["value"] == pytest.approx(0.7)
    assert of(document, "ties")["scores"]["pick"]["corrected"] == (None if chance is None else pytest.approx(0.7))
    said = [w for w in document["warnings"] if w.startswith("pick: not corrected for chance: ")]
    assert bool(said) == (chance is None)
    assert ["no chance score is known for 'mass'" in w for w in said] == [metric == "mass"] * len(said)


def test_an_accuracy_that_is_no_right_or_wrong_has_no_chance(tmp_path: Path) -> None:
    """TruthfulQA's `acc` of several true answers is a share of probability: guessing does not score 1/choices."""
    store = ScoreStore(tmp_path)
    shares = np.random.default_rng(0).random(240).tolist()
    scores = stored(
        store, {BASE: {"pick": shares}}, kind="multiple_choice", metric="acc", items=[{"choices": FOUR, "gold": 0}] * 240
    )
    document = compare(store, scores).to_dict()
    assert document["tasks"][0]["chance"] is None
    assert (
        "pick: not corrected for chance: its items do not determine a chance score, and the suite does not set `chance` for it."
        in (document["warnings"])
    )


def test_metrics_that_no_mean_takes_need_no_chance(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    items = [{"choices": FOUR, "gold": 0}] * 240
    values = {BASE: {"pick": right(0.5)}, TIES: {"pick": right(0.7)}}
    lower = compare(store, stored(store, values, kind="multiple_choice", metric="acc", items=items, lower=["acc"])).to_dict()
    assert lower["tasks"][0]["chance"] == 0.0
    assert of(lower, "ties")["mean"] is None
    assert not any("corrected" in w for w in lower["warnings"])
    other = compare(
        store, stored(store, values, kind="multiple_choice", metric="mass", items=items, roles={"pick": "other"})
    ).to_dict()
    assert not any("corrected" in w for w in other["warnings"])


def test_reports_and_tables_claim_no_correction_that_was_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ScoreStore(tmp_path)
    values = {BASE: {"pick": right(0.5), "draw": right(0.5)}, TIES: {"pick": right(0.7), "draw": right(0.6)}}
    fields: dict[str, Any] = {"kind": "multiple_choice", "metric": "acc"}
    part = compare(store, stored(store, values, chance={"draw": 0.5}, **fields))
    page, text, _ = (p.read_text("utf-8") for p in render(part.to_dict(), tmp_path / "part"))
    scores_table(part, [])
    said = capsys.readouterr().err
    for shown in (page, text):
        assert "corrected for chance except on pick" in shown
        assert "The chance score of pick is not known" in shown
    assert "mean over skills, chance-corrected except on pick;" in said
    none = compare(store, stored(store, values, **fields))
    page, text, _ = (p.read_text("utf-8") for p in render(none.to_dict(), tmp_path / "none"))
    scores_table(none, [])
    assert "The mean over skills is not corrected for chance." in page
    assert "the mean is not corrected for chance" in text
    assert "mean over skills, not corrected for chance;" in capsys.readouterr().err
    kept = compare(store, stored(store, values, chance={"pick": 0.25, "draw": 0.5}, **fields))
    page, text, _ = (p.read_text("utf-8") for p in render(kept.to_dict(), tmp_path / "kept"))
    assert "The mean over skills is corrected for chance." in page
    assert "The chance score of" not in page + text


# Ratios to parents


def ratios(tmp_path: Path, parent: Sequence[float], merge: Sequence[float], **options: Any) -> Comparison:
    store = ScoreStore(tmp_path)
    values = {BASE: {"add": [0.0] * len(parent)}, ADD: {"add": parent}, TIES: {"add": merge}}
    return compare(store, stored(store, values, **options))


def test_kept_is_withheld_where_the_parent_is_near_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = ratios(tmp_path, right(0.28), right(0.29, seed=3), chance={"add": 0.25})
    document = comparison.to_dict()
    low, high = score_interval(np.array(right(0.28)), np.arange(240) % 30)
    reason = f"its best parent, add, scores 28 [{100 * low:.0f}, {100 * high:.0f}] %, too close to chance (25 %)"
    assert of(document, "ties")["kept"] == {"add": {"value": None, "low": None, "high": None, "reason": reason}}
    assert of(document, "ties")["kept_mean"] == {"value": None, "low": None, "high": None, "reason": f"add: {reason}"}
    page, text, _ = (p.read_text("utf-8") for p in render(document, tmp_path / "report"))
    sentence = f"Kept is withheld for ties on add: {reason}."
    assert sentence in page
    assert sentence.replace("[", "\\[").replace("]", "\\]") in text
    scores_table(comparison, [])
    told = capsys.readouterr()
    assert sentence in told.err
    assert "withheld" in told.out


@pytest.mark.parametrize(("share", "given"), [(0.10, True), (0.05, True), (7 / 240, False)])
def test_a_ratio_needs_a_parent_whose_interval_keeps_half_of_its_score(tmp_path: Path, share: float, given: bool) -> None:
    """12 of 240 items right: the interval begins at 2.9 %, above half; of 7 at 1.4 %, just below half."""
    low, _ = score_interval(np.array(right(share)), np.arange(240) % 240)
    assert (low >= share / 2) is given
    found = of(ratios(tmp_path, right(share), right(share / 2), clusters=240).to_dict(), "ties")["kept"]["add"]
    assert (found["value"] == pytest.approx(0.5)) if given else found["reason"].startswith("its best parent, add, scores ")


def test_a_parent_below_chance_is_named(tmp_path: Path) -> None:
    found = of(ratios(tmp_path, right(0.1), right(0.9), chance={"add": 0.5}).to_dict(), "ties")
    assert found["kept"]["add"]["reason"].startswith("its best parent, add, scores 10 [")
    assert found["kept"]["add"]["reason"].endswith("] %, too close to chance (50 %)")


def test_kept_is_withheld_where_chance_is_not_known(tmp_path: Path) -> None:
    found = of(ratios(tmp_path, right(0.9), right(0.8), kind="multiple_choice", metric="acc").to_dict(), "ties")
    assert found["kept"]["add"]["reason"] == "the chance score of add is not known"
    assert found["kept"]["add"]["value"] is None


def test_tasks_whose_ratio_is_withheld_are_no_part_of_the_overall_one(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    values = {
        BASE: {"add": right(0.0), "sort": right(0.0)},
        ADD: {"add": right(0.8), "sort": right(0.02)},
        TIES: {"add": right(0.4), "sort": right(0.9)},
    }
    found = of(compare(store, stored(store, values)).to_dict(), "ties")
    assert found["kept_mean"]["value"] == pytest.approx(0.5)
    assert found["kept"]["sort"]["value"] is None


def test_a_perfect_parent_and_a_perfect_merge_are_not_known_without_error(tmp_path: Path) -> None:
    """Resampling sees no spread where all items are right; 60 of 60 may still be 94 %."""
    found = of(ratios(tmp_path, right(1.0, 60), right(1.0, 60)).to_dict(), "ties")["kept"]["add"]
    assert found["value"] == 1.0
    assert 0.85 < found["low"] < 0.97
    assert 1.03 < found["high"] < 1.15


@pytest.mark.parametrize("clusters", [12, 40])
def test_the_interval_of_a_ratio_covers_it(tmp_path: Path, clusters: int) -> None:
    """200 draws of a parent at 60 % and a merge at 40 %, clustered and paired: kept is 2/3."""
    rng, label, inside = np.random.default_rng(clusters), np.repeat(np.arange(clusters), 6), 0
    suite = Suite(suite="toy", tasks=("add",))
    for draw in range(200):
        level = 0.4 * rng.normal(size=clusters)[label] + 0.6 * rng.normal(size=label.size)
        scores = {
            c.digest: (level + 0.7 * rng.normal(size=label.size) < cut).astype(float)
            for c, cut in ((ADD, 0.2546), (TIES, -0.2546))
        }
        table = Table("add", "em", suite, str(draw), [{}] * label.size, label, scores, {})
        kept, _ = kept_of([table], TIES, {"add": ADD.digest})
        inside += kept["add"].low <= 2 / 3 <= kept["add"].high  # type: ignore[operator]
    assert 182 <= inside <= 199


def test_percentiles_are_moved_outwards_for_few_effective_clusters(tmp_path: Path) -> None:
    """31 clusters of which one holds half of the items are worth 4: 95 % intervals have the t quantile of 3 degrees of freedom."""
    sizes = [120, *[4] * 30]
    rng, label, store = np.random.default_rng(0), np.repeat(np.arange(31), sizes), ScoreStore(tmp_path)
    values = {c.digest: (rng.random(240) < share).astype(float) for c, share in ((BASE, 0.1), (ADD, 0.9), (TIES, 0.7))}
    scores = stored(store, {c: {"add": values[c.digest].tolist()} for c in (BASE, ADD, TIES)}, sizes=sizes)
    found = of(compare(store, scores).to_dict(), "ties")
    table = Table("add", "em", Suite(suite="toy", tasks=("add",)), scores[0].plan, [{}] * 240, label, values, {})
    assert table.effective == pytest.approx(240**2 / (120**2 + 30 * 4**2))
    tail = expanded_tail(0.025, table.effective)
    assert tail < 0.001
    mine, parent = table.resampled[TIES.digest], table.resampled[ADD.digest]
    for shown, draws in ((found["mean"], mine), (found["kept"]["add"], mine / parent), (found["kept_mean"], mine / parent)):
        assert (shown["low"], shown["high"]) == pytest.approx(tuple(np.quantile(draws, (tail, 1 - tail))))


def test_few_clusters_add_the_single_intervals_in_squares(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    values = {BASE: {"add": right(0.2), "sort": right(0.3)}, TIES: {"add": right(0.5), "sort": right(0.6, seed=1)}}
    found = of(compare(store, stored(store, values, clusters=12)).to_dict(), "ties")
    down = [s["value"] - s["low"] for s in found["scores"].values()]
    assert found["mean"]["low"] == pytest.approx(found["mean"]["value"] - math.hypot(*down) / 2)
