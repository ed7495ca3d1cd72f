"""The rule of unseen clusters is computed by hand, in every unit and order, and keeps what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from worlds.simulated import rows as judged_rows
from worlds.simulated import table

from workbench.compare.families import measure_of, ruled
from workbench.scores.changes import Changes, pooled
from workbench.scores.paired import Paired, paired, paired_ratio
from workbench.scores.signflips import skew_p, step_down, unseen_p
from workbench.scores.suite import reach_of
from workbench.scores.unseen import Standing, alone, standings


def steps(seed: int, n: int = 100, mean: float = 0.02, unit: float = 1.0, each: int = 1, **given: float) -> Paired:
    """A score that rises by about .02 on every item, as ROUGE or a probability does."""
    d = mean + 0.03 * np.random.default_rng(seed).normal(size=n)
    before = np.full(n, 0.5)
    return paired(unit * before, unit * (before + d), (np.arange(n) // each).tolist(), reach=unit, **given)


def losing(seed: int, n: int = 100, share: float = 0.03) -> Changes:
    """Rare items gain all, 2 in 5 lose a little; 0 on average."""
    rng = np.random.default_rng(seed)
    draw = rng.random(n)
    d = np.where(draw < share, 1.0, np.where(draw > 0.6, -share / 0.4 * rng.uniform(0, 2, n), 0.0))
    before = np.where(d > 0, 0.0, 0.5)
    return paired(before, before + d, reach=1.0).changes


def of_family(rows: Sequence[Changes], metrics: Sequence[str] | None = None) -> list[float]:
    return [found.p for found in ruled(rows, range(len(rows)), metrics or ["m"] * len(rows), 0.05)]


def test_the_unseen_sum_by_hand() -> None:
    """Ten clusters of four items that fall; two items rise, and the clusters' means do not."""
    rng = np.random.default_rng(1)
    d = -rng.uniform(0.1, 0.2, 40)
    d[[3, 17]] = 0.05, 0.08
    pair = paired(np.full(40, 0.5), 0.5 + d, (np.arange(40) // 4).tolist(), reach=1.0)
    sums, likeness = d.reshape(10, 4).sum(1), math.sqrt(0.1 + 0.9 / 4)
    item = ((0.05**2.5 + 0.08**2.5) / max(0.05**2 + 0.08**2, (d**2).sum() / 2)) ** 2
    means = sums / 4 / likeness
    for rows, x in ((1, 0.5), (40, max(0.5 / 40, item))):
        size = 4 * likeness * (x**2.5 / (max(0.0, (means**2).sum() / 2) + x * x)) ** 2
        deviation = np.sqrt(((sums - sums.mean()) ** 2).mean())
        size = math.sqrt(max(size**2 - 4 * deviation**2, 1e-6 * size**2, (1e-6 * np.abs(sums).max()) ** 2))
        flat = replace(pair.changes, sums=np.zeros(10), items=replace(pair.changes.items, rises=(0.0, 0.0), falls=(0.0, 0.0)))
        found = standings([pair.changes, *[flat] * (rows - 1)], [1e-3] * rows, [0.05] * rows, ["m"] * rows, 0.05)[0]
        assert found.size == pytest.approx(size)
        assert found.p == pytest.approx(max(1e-3, 0.8 * skew_p(sums, np.full(10, 4.0)), 0.8 * unseen_p(-sums, size)))


def test_the_unseen_sum_of_answers_in_unequal_clusters_by_hand() -> None:
    """Right/wrong items: the other clusters' means count by their sizes, the floor is a quarter, the p counts whole."""
    sizes = np.array([4, 4, 6, 6, 8, 8, 10, 10, 12, 12])
    cluster = np.repeat(np.arange(10), sizes)
    before = np.ones(80)
    after = before.copy()
    for k, lost in enumerate((2, 1, 3, 2, 4, 3, 5, 4, 6, 0)):
        after[np.flatnonzero(cluster == k)[:lost]] = 0
    before[-1] = 0  # one item of the last cluster is gained
    found = alone(paired(before, after, cluster.tolist()).changes)
    sums, likeness = np.bincount(cluster, after - before), math.sqrt(0.1 + 0.9 / 8)
    means = sums / sizes / likeness
    rises, shares = np.maximum(means, 0), sizes / 8
    low = max(float((shares * rises**2).sum()), float((shares * means**2).sum()) / 4)
    size = 8 * likeness * ((float((shares * rises**2.5).sum()) + 1) / (low + 1)) ** 2
    deviation = np.sqrt(((sums - sums.sum() / 80 * sizes) ** 2).mean())
    assert found.size == pytest.approx(math.sqrt(max(size**2 - 4 * deviation**2, 1e-6 * size**2)))
    assert found.p == pytest.approx(max(found.tested, 0.8 * skew_p(sums, sizes.astype(float)), unseen_p(-sums, found.size)))
    assert (found.by_unseen, alone(steps(1).changes).by_unseen) == (1.0, 0.8)


def test_the_skewness_counts_for_the_rows_of_other_metrics() -> None:
    """Twelve rows of one metric share their swings; twelve metrics of one row each have none to share, so that each counts for all."""
    rows = [steps(seed, 60).changes for seed in range(12)]
    same, apart = (
        standings(rows, [1e-3] * 12, [0.05 / 12] * 12, metrics, 0.05) for metrics in (["m"] * 12, list("abcdefghijkl"))
    )
    assert {round(row.by_skew, 6) for row in same} == {0.8}
    assert {round(row.by_skew, 6) for row in apart} == {9.6}
    assert {round(row.by_unseen, 6) for row in [*same, *apart]} == {9.6}


def test_metrics_of_other_units_do_not_mix() -> None:
    """A task in nats that swings by hundreds takes no power from one in shares."""
    rng, n = np.random.default_rng(8), 100
    share = table(np.stack([np.full(n, 0.5), 0.52 + 0.03 * rng.normal(size=n)]), np.arange(n), margin=0.001, task="a")
    nats = table(np.stack([np.zeros(n), 300 * rng.normal(size=n)]), np.arange(n), margin=0.001, task="b")
    judged = {row.task: row.verdict for row in judged_rows(replace(share, metric="rougeL"), replace(nats, metric="nll"))}
    assert judged["a"] == "better"
    assert {measure_of(t) for t in (share, replace(share, ratio="bits_per_byte"))} == {
        ("acc", None, False),
        ("acc", "bits_per_byte", False),
    }


@pytest.mark.parametrize(("n", "each"), [(100, 1), (300, 5), (1000, 20)])
def test_small_steps_of_every_item_are_found_in_every_unit(n: int, each: int) -> None:
    """The gain of 2 points that a rule with the metric's whole range withheld: ROUGE as a share and as a percentage."""
    pairs = [steps(1, n, each=each, unit=unit) for unit in (1.0, 100.0, 0.37)]
    assert [pair.p <= 0.05 for pair in pairs] == [True] * 3
    assert pairs[1].p == pytest.approx(pairs[0].p, rel=1e-9)
    families = [of_family([steps(seed, n, each=each, unit=unit).changes for seed in range(6)]) for unit in (1.0, 100.0)]
    assert families[0] == pytest.approx(families[1], rel=1e-9)
    assert max(families[0]) <= 0.05


def test_right_and_wrong_items_of_their_own_need_no_assumption() -> None:
    rng = np.random.default_rng(2)
    before, after = (rng.random(200) < 0.5) * 1.0, (rng.random(200) < 0.63) * 1.0
    for unit in (1.0, 100.0):
        changes = paired(unit * before, unit * after).changes
        assert (alone(changes).p, alone(changes).withstands(0.05)) == (changes.flipped, None)
    by_two = alone(paired(before, after, (np.arange(200) // 2).tolist()).changes)
    assert by_two.size > 0, "items that belong together may move together"


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_rows_and_the_names_of_metrics_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [losing(seed + i) for i in range(5)] + [steps(seed + i, 80).changes for i in range(4)]
    metrics = ["f1"] * 5 + ["rougeL"] * 4
    plain = of_family(rows, metrics)
    order = rng.permutation(len(rows))
    mixed = of_family([rows[i] for i in order], [f"other {metrics[i]}" for i in order])
    assert [plain[i] for i in order] == pytest.approx(mixed)


def test_what_other_rows_show_is_held_against_a_row() -> None:
    """A task whose sample has no gaining item is "worse" by the flips; the other tasks of the metric show such gains."""
    seeds = [s for s in range(400) if losing(s).items.rises == (0.0, 0.0) and losing(s).flipped < 1e-3][:1]
    (lucky,) = (losing(s) for s in seeds)
    others = [losing(1000 + s) for s in range(11)]
    assert any(row.items.rises[0] > 0 for row in others)
    assert of_family([lucky, *others])[0] > 0.05
    assert of_family([lucky, *others], ["lucky", *["m"] * 11])[0] < of_family([lucky, *others])[0]


def test_a_broken_configuration_takes_no_power_from_the_others() -> None:
    """It is shown to be worse first, and then its falls no longer count."""
    rng = np.random.default_rng(3)
    broken = paired(np.full(100, 0.9), 0.9 - rng.uniform(0.2, 0.9, 100), reach=1.0).changes
    gains = [steps(seed).changes for seed in range(11)]
    assert max(of_family([*gains, broken])) <= 0.05
    kept = standings([*gains, broken], [1e-4] * 11 + [0.06], [0.01] * 12, ["m"] * 12, 0.05)
    assert max(row.p for row in kept[:11]) > 0.05, "while it is not shown to be worse, its falls count"


def test_a_family_counts_for_its_independent_rows() -> None:
    """Twelve equal rows count for one, twelve independent ones for about twelve."""
    rng = np.random.default_rng(4)
    one = rng.normal(size=60)
    for sums, least, most in ((np.tile(one[:, None], 12), 0.9, 1.1), (rng.normal(size=(60, 12)), 8, 12.5)):
        (found,) = step_down([(sums, np.sqrt((sums**2).sum(0)))], 0.05)
        assert least <= 0.05 / np.mean([row.single for row in found]) <= most


@pytest.mark.parametrize("each", [1, 5])
def test_a_verdict_holds_up_to_the_change_that_it_says(each: int) -> None:
    standing = alone(steps(5, 60, mean=0.06, each=each).changes)
    assert standing.p <= 0.05
    most = standing.withstands(0.05)
    assert most is not None
    sums, m = standing.changes.sums, 60 // each
    sd = np.sqrt(((sums - sums.mean()) ** 2).mean())
    size = math.sqrt((most * each * math.sqrt(0.1 + 0.9 / each)) ** 2 - 4 * sd**2)
    assert 0.8 * unseen_p(sums, size) == pytest.approx(0.05, rel=0.05)
    assert len(sums) == m
    assert alone(steps(5, 600, mean=0.06, each=each).changes).withstands(0.05) > most  # type: ignore[operator]
    assert alone(losing(0)).withstands(0.05) is None, "there is no verdict"


def test_the_smallest_difference_is_that_of_the_deciding_p() -> None:
    """An unseen item may lose half of the range: 30 items that all gain the same cannot be told from 0 below that."""
    pair = steps(6, 30, mean=0.0)
    standing = alone(pair.changes)
    critical = pair.changes.critical(0.05)
    t = pair.changes.as_t(critical)
    factor = standing.needed(t, 0.05)
    assert factor > 1.5
    mde, plain = pair.mde(critical, standing), pair.mde(critical)
    assert mde is not None
    assert plain is not None
    assert (mde - plain) / pair.se == pytest.approx((factor - 1) * t)
    shifted = alone(steps(6, 30, mean=factor * t * pair.se - pair.diff).changes)
    assert 0.01 < shifted.p <= 0.06, "the falls become fewer with the mean, so that it is no underestimate"
    needs, by_flips = pair.needs(0.02, critical, standing), pair.needs(0.02, critical)
    assert needs is not None
    assert by_flips is not None
    assert needs > by_flips
    found = np.mean([steps(100 + s, needs).p <= 0.05 for s in range(60)])
    assert 0.7 <= found <= 1.0


def test_more_clusters_make_a_withheld_verdict_stand() -> None:
    after = np.full(40, 0.5)
    after[:12] -= 0.01
    pair = paired(np.full(40, 0.5), after, reach=1.0)
    assert pair.changes.flipped < 0.01
    assert pair.p > 0.05
    needed = pair.needs_to_stand(alone(pair.changes), 0.05)
    assert needed is not None
    times = math.ceil(needed / 40)
    assert times > 1
    assert paired(np.full(40 * times, 0.5), np.tile(after, times), reach=1.0).p <= 0.05


def test_worst_is_what_is_assumed() -> None:
    before, after = np.full(40, 0.5), np.full(40, 0.5) - 0.01 * (np.arange(40) < 12)
    held = paired(before, after, worst=0.5)
    assert held.p == pytest.approx(paired(before, after, reach=1.0).p)
    assert paired(before, after, worst=0.02).p < 0.05 < held.p
    assert paired(before, after).p < 0.05, "no range is read from the values"
    words = np.full(40, 30.0)
    bits = paired_ratio("bits_per_byte", -before * words, -after * words, words, worst=0.5)
    assert bits.changes.items.assumed == pytest.approx(0.5 * math.log(2))


def test_tasks_are_pooled_with_the_units_of_their_mean() -> None:
    one, other = steps(7, 40, each=4), steps(8, 60)
    both = pooled([one.changes, other.changes], [2.0, 1.0]).items
    by_hand = [
        (100 / 2 / 40 * 2.0**power * one.changes.items.rises[i] + 100 / 2 / 60 * other.changes.items.rises[i])
        for i, power in enumerate((2.5, 2.0))
    ]
    assert both.rises == pytest.approx(tuple(by_hand))
    assert both.each == pytest.approx(100 / 70)
    assert both.assumed == 1.0
    assert not both.answers


@pytest.mark.parametrize(
    ("metric", "values", "reach"),
    [
        ("acc,none", [0, 1], 1),
        ("exact_match,strict-match", [0, 0], 1),
        ("rougeL", [0.2, 0.9], 1),
        ("rouge1_max", [20, 44.5], 100),
        ("prompt_level_strict_acc", [0, 1], 1),
        ("qa_f1_score", [0, 0.5], 1),
        ("brier_score", [0.1, 1.7], 2),
        ("f1", [0, 101], 0),
        ("f1", [-0.1, 1], 0),
        ("rougeL_diff", [0.1, 0.2], 0),
        ("nll", [0.1, 0.2], 0),
        ("margin", [0.1, 0.2], 0),
        ("perplexity", [1, 2], 0),
        ("latency", [0.1, 0.9], 0),
    ],
)
def test_a_range_is_declared_by_the_metric(metric: str, values: Any, reach: float) -> None:
    assert reach_of(metric, np.array(values, float), np.array(values, float)) == reach


def test_no_change_has_no_standing() -> None:
    same = paired(np.full(9, 0.3), np.full(9, 0.3)).changes
    cancelled = paired([0.4, 0.5, 0.6, 0.7], [0.5, 0.4, 0.7, 0.6], [0, 0, 1, 1])
    assert (alone(same).p, cancelled.p) == (1.0, 1.0)
    assert isinstance(alone(same), Standing)
