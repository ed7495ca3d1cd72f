"""Paired, clustered statistics by hand and by simulation; `test_against_scipy.py` has what other libraries compute too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit, xlogy

from workbench.scores.changes import pooled
from workbench.scores.paired import paired
from workbench.scores.paired import tested_together as together_of
from workbench.scores.signflips import PATTERNS
from workbench.scores.statistics import (
    brier_score,
    clustered_se,
    codes,
    effective_clusters,
    interval,
    ratio_interval,
    resampled_means,
    score,
    score_interval,
)

# Statistics


def correlated(rng: np.random.Generator, n: int, per: int, gain: float = 0.0, by_cluster: float = 0.0) -> tuple[Any, Any, Any]:
    """0/1 scores of two configurations on the same items; effects may vary by cluster."""
    cluster = np.arange(n) // per
    hard = rng.normal(size=n) + 0.7 * rng.normal(size=n // per)[cluster]
    shift = gain + by_cluster * rng.normal(size=n // per)[cluster]
    noise = rng.normal(size=(2, n)) * 0.6
    return (hard + noise[0] > 0) * 1.0, (hard + noise[1] + shift > 0) * 1.0, cluster


def test_unequal_clusters_count_as_fewer() -> None:
    """CR2 by hand: each cluster's squared deviation over 1 - its share of the items."""
    values, cluster = np.array([1.0, 3, 2, 8, 0, 4]), np.array([0, 0, 0, 1, 2, 2])
    shares, deviations = np.array([3, 1, 2]) / 6, np.array([6 - 9, 8 - 3, 4 - 6])
    assert clustered_se(values, cluster) == pytest.approx(math.sqrt((deviations**2 / (1 - shares)).sum()) / 6)
    assert effective_clusters(np.array([3, 1, 2])) == pytest.approx(36 / 14)
    assert clustered_se(np.array([0, 1.0, 1, 1]), np.array([0, 0, 1, 1])) == pytest.approx(math.sqrt(2 * 0.5**2 / (1 - 0.5)) / 4)
    assert effective_clusters(np.full(9, 7)) == pytest.approx(9)


def test_by_hand() -> None:
    # Ten clusters of two items. Differences by cluster: +2 in six, 0 in three, -1 in one: mean 11/20.
    sums = [2, 2, 2, 2, 2, 2, 0, 0, 0, -1]
    a = [0, 0] * 9 + [1, 0]
    b = [1, 1] * 6 + [0, 0] * 4
    pair = paired(a, b, [i // 2 for i in range(20)])
    assert (pair.n, pair.clusters, pair.wins, pair.losses) == (20, 10, 12, 1)
    assert pair.diff == pytest.approx(0.55)
    # SE: sqrt(10/9 * sum (s - 1.1)^2) / 20
    assert pair.se == pytest.approx(math.sqrt(10 / 9 * sum((s - 1.1) ** 2 for s in sums)) / 20)
    # Sign flips: all six twos alike (12), the one against them (11, what was seen: half) or with them (13), the zeros anyhow.
    assert pair.changes.flipped == pytest.approx((16 / 2 + 16) / 1024)
    assert pair.p > pair.changes.flipped  # two thirds of the p that is corrected for skewness
    low, high = pair.interval(0.05)
    assert 0 < low < 0.55 < high <= 1
    assert pair.interval(pair.p)[0] > 0  # p is at most the level
    assert pair.interval(0.02)[0] <= 0  # p > 0.02: a stricter interval holds 0


def tango(d: Any, x: float) -> float:
    """Tango's score statistic for a true difference x, its likelihood maximised by brute force over the share of falls."""
    n, rises, falls = d.size, int((d > 0).sum()), int((d < 0).sum())

    def loss(q: float) -> float:
        return -(xlogy(rises, max(q + x, 0.0)) + xlogy(falls, q) + xlogy(n - rises - falls, max(1 - 2 * q - x, 0.0)))  # type: ignore[no-any-return]

    found = minimize_scalar(loss, bounds=(max(0.0, -x), (1 - x) / 2), method="bounded", options={"xatol": 1e-12})
    q = min((found.x, max(0.0, -x), (1 - x) / 2), key=loss)
    return float((d.sum() - n * x) / math.sqrt(n * (2 * q + x - x * x)))


@pytest.mark.parametrize(("rises", "falls", "n"), [(0, 2, 240), (1, 5, 60), (12, 3, 100), (0, 9, 10), (40, 45, 300)])
def test_independent_answers_get_tangos_interval(rises: int, falls: int, n: int) -> None:
    d = np.r_[np.ones(rises), -np.ones(falls), np.zeros(n - rises - falls)]
    a = np.where(d < 0, 1.0, 0.0)
    pair = paired(a, a + d)
    level = 0.05
    z = stdtrit(n - 1, 1 - level / 2)
    low, high = pair.within(pair.changes.critical(level), rejected=abs(tango(d, 0.0)) > z)
    # The clustered variance of items of their own has n - 1 where the score statistic has n.
    z *= math.sqrt(n / (n - 1))
    assert tango(d, low) == pytest.approx(z, abs=1e-3) or low in (-1.0, 0.0)
    assert tango(d, high) == pytest.approx(-z, abs=1e-3) or high in (1.0, 0.0)
    assert low < pair.diff < high


def test_two_losses_of_240_do_not_exclude_a_loss_of_two_points() -> None:
    a = np.ones(240)
    b = np.r_[np.zeros(2), np.ones(238)]
    low, high = paired(a, b).interval()
    assert low < -0.02  # mean +- t * SE ends at -0.0199
    assert 0 <= high < 0.02


def test_a_design_effect_is_at_least_one() -> None:
    """Wins and losses that cancel within clusters make clustered errors too small: the interval is that of independent items."""
    d = np.tile([1.0, -1.0], 40)
    d[:3] = 1
    a = np.where(d < 0, 1.0, 0.0)
    cluster = (np.arange(80) // 2).tolist()
    together, apart = paired(a, a + d, cluster), paired(a, a + d)
    assert together.changes.scale == pytest.approx(apart.changes.scale)
    assert together.within(2.0, rejected=False)[1] >= apart.within(2.0, rejected=False)[1] - 1e-9
    sums = d.reshape(40, 2).sum(1)
    assert together.changes.scale == pytest.approx(math.sqrt(d @ d))
    for unit in (0.5, 3.0):  # graded scores, and scores without a range
        assert paired(a * unit, (a + d) * unit, cluster).changes.scale == pytest.approx(unit * math.sqrt(sums @ sums))
    graded = [paired(a / 2, (a + d) / 2, labels).within(2.0, rejected=False) for labels in (cluster, None)]
    assert graded[0][1] < graded[1][1] - 0.01, "scores between 0 and 1 may cancel within clusters"


RANGES: list[tuple[list[float], list[float], float | None, tuple[float, bool] | None]] = [
    ([0, 1, 0], [1, 1, 0], None, (1.0, True)),
    ([0, 0.5, 1], [1, 1, 0], None, (1.0, False)),
    ([0, 1, 0], [1, 0.5, 0], None, (1.0, False)),
    ([-0.1, 1, 0], [1, 1, 0], None, None),
    ([0, 1, 0], [-0.1, 1, 0], None, None),
    ([0, 1.1, 0], [1, 1, 0], None, None),
    ([0, 1, 0], [1, 1.1, 0], None, None),
    ([0, 1, 0], [1, 1, 0], 2.0, (2.0, True)),
    ([0, 3, 0], [1, 1, 0], 4.0, (4.0, False)),
    ([0, 1, 0], [1, 1, 0], math.inf, None),
]


@pytest.mark.parametrize(("a", "b", "span", "expected"), RANGES)
def test_range_of_scores(a: list[float], b: list[float], span: float | None, expected: tuple[float, bool] | None) -> None:
    """Scores that all lie in [0, 1] change by at most 1; other scores have no range unless it is given."""
    found = paired(a, b, span=span).changes
    assert (found.bounded and (found.bounded.span, found.bounded.answers)) == expected
    assert (found.worst, paired(a, b, span=span, worst=0.3).changes.worst) == (expected[0] if expected else None, 0.3)


def test_mean_over_tasks() -> None:
    """Tasks count alike whatever their numbers of items; a design effect and a range come along."""
    rng = np.random.default_rng(8)
    one = paired(*[(rng.random(40) < 0.5) * 1.0 for _ in range(2)], (np.arange(40) // 4).tolist())
    two = paired(*[(rng.random(120) < 0.5) * 1.0 for _ in range(2)], (np.arange(120) // 4).tolist())
    both = pooled([one.changes, two.changes])
    assert both.mean == pytest.approx((one.diff + two.diff) / 2)
    assert both.effective == pytest.approx(1 / (0.25 / 10 + 0.25 / 30))
    assert both.sizes.sum() == pytest.approx(160)
    single = pooled([one.changes])
    assert single.interval(2.0, rejected=False) == pytest.approx(one.within(2.0, rejected=False))
    scaled = pooled([one.changes], [2.0])
    assert scaled.interval(2.0, rejected=False) == pytest.approx([2 * end for end in one.within(2.0, rejected=False)])


def test_test_and_interval_agree() -> None:
    rng = np.random.default_rng(4)
    for n, per in ((40, 4), (60, 4), (100, 5), (200, 4)):
        for _ in range(40):
            a, b, cluster = correlated(rng, n, per, gain=0.35)
            pair = paired(a, b, cluster.tolist())
            for level in (0.05, 0.01, 0.05 / 24):
                low, high = pair.interval(level)
                assert (pair.p <= level) == (low > 0 or high < 0) or pair.unchanged


@pytest.mark.parametrize(("n", "per"), [(240, 6), (60, 5)])
def test_calibration_and_coverage(n: int, per: int) -> None:
    """No difference on average, but effects differ by cluster: 5 % false verdicts (within 400-trial noise), 95 % coverage."""
    rng = np.random.default_rng(5)
    pairs = [paired(*correlated(rng, n, per, by_cluster=0.5)) for _ in range(400)]
    false = np.mean([pair.p <= 0.05 for pair in pairs])
    assert 0.015 <= false <= 0.08
    truth = float(np.mean([pair.diff for pair in pairs]))
    covered = np.mean([low <= truth <= high for low, high in (pair.interval(0.05) for pair in pairs)])
    assert covered >= 0.92


def test_identical_and_constant_differences() -> None:
    from scipy.stats import t

    same = paired([1, 0, 1], [1, 0, 1])
    assert same.unchanged
    assert same.interval() == (0.0, 0.0)
    assert same.mde() is None
    for tiny in (1e-12, -1e-12):  # changes that rounding may make, though not their sums
        noise = paired(np.zeros(60), np.full(60, tiny), [i // 10 for i in range(60)])
        assert (noise.unchanged, noise.p, noise.interval()) == (True, 1.0, (0.0, 0.0))
    everything = paired([0] * 60, [1] * 60, [i // 3 for i in range(60)])
    assert everything.se == 0
    assert everything.p == pytest.approx(0.5 / PATTERNS)  # no random pattern but the first, and that counts half
    low, high = everything.interval()
    t2 = t.ppf(0.975, 19) ** 2
    assert low == pytest.approx((60 - t2) / (60 + t2))  # Tango's for 60 of 60; not [1, 1]
    assert high == 1.0
    for wrong in (([0, 1], [0, 1, 1]), ([], []), ([0, 1], [1, 0], [0])):
        with pytest.raises(ValueError, match=f"expected paired items, got {len(wrong[0])} and {len(wrong[1])} scores with"):
            paired(*wrong)


def test_score_intervals() -> None:
    from scipy.stats import t

    low, high = score_interval(np.zeros(40), np.arange(40))
    q = t.ppf(0.975, 39) ** 2
    assert low == 0
    assert high == pytest.approx(q / (40 + q))  # Wilson with no success
    values = np.repeat([1.0, 0.0], 30)
    apart, together = score_interval(values, np.arange(60)), score_interval(values, np.arange(60) // 3)
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])  # three alike in a cluster: a third of the information
    assert score_interval(np.ones(5), np.zeros(5, int)) == (0.0, 1.0)
    low, high = score_interval(np.linspace(0.2, 0.4, 30), np.arange(30))
    assert 0.2 < low < 0.3 < high < 0.4


def plain_interval(groups: list[list[float]]) -> tuple[float, float]:
    """The interval of right/wrong items from its definition: products for the beta-binomial likelihood, Wilson's bounds as roots."""
    sizes, n = [len(group) for group in groups], sum(map(len, groups))
    right = [sum(group) for group in groups]
    mean, effective_k = sum(right) / n, n**2 / sum(size**2 for size in sizes)
    variance = sum((r - s * mean) ** 2 / (1 - s / n) for r, s in zip(right, sizes, strict=True)) / n**2
    smooth, total, weighted = (sum(right) + 1) / (n + 2), 0.0, 0.0
    for i in range(20):
        rho = (i + 0.5) / 20
        a, b, density = smooth * (1 / rho - 1), (1 - smooth) * (1 / rho - 1), rho
        for r, s in zip(right, sizes, strict=True):
            density *= math.prod(a + j for j in range(int(r))) * math.prod(b + j for j in range(int(s - r)))
            density /= math.prod(a + b + j for j in range(s))
        total, weighted = total + density, weighted + density * rho
    rare = sum(r < s if smooth > 0.5 else r > 0 for r, s in zip(right, sizes, strict=True))
    correlation = 0.0 if max(sizes) == 1 else weighted / total * min(1, 12 / max(rare, 1))
    seen = variance * n / (mean * (1 - mean)) if 0 < mean < 1 else 1.0
    items = n / max(seen, 1 + (n / effective_k - 1) * correlation)
    q = float(stats.t.ppf(0.975, max(effective_k - 1, 1))) ** 2 / items
    low, high = sorted(np.roots([1 + q, -2 * mean - q, mean**2]).real)
    return max(low, 0.0), min(high, 1.0)


@pytest.mark.parametrize("seed", range(13))
@pytest.mark.parametrize("level", [0.03, 0.5, 0.6, 0.97, 1.0])
def test_interval_of_right_and_wrong_items(level: float, seed: int) -> None:
    """Few and many clusters, two, of equal and of other sizes, of one item; answers alike within clusters or not."""
    rng = np.random.default_rng(seed)
    sizes = [1] * 40 if seed % 4 == 0 else rng.integers(1, 7, (9, 30)[seed % 2]).tolist() if seed % 4 < 3 else [5] * 18
    sizes = [4, 3] if seed == 12 else sizes
    alike = rng.random() < 0.5
    groups = [[float(x < level) for x in (rng.random(s) if not alike else rng.random(1).repeat(s))] for s in sizes]
    values, cluster = np.array([x for group in groups for x in group]), np.repeat(np.arange(len(sizes)), sizes)
    assert score_interval(values, cluster) == pytest.approx(plain_interval(groups), abs=1e-9)


def test_interval_of_other_scores() -> None:
    """Mean +- t times the clustered error, clipped where all scores lie in [0, 1]; nothing from one cluster."""
    cluster = np.arange(12) // 2
    for values, clip in (
        (np.r_[np.zeros(6), 0.2, np.zeros(5)], (0.0, 1.0)),
        (np.r_[np.ones(6), 0.7, np.ones(5)], (0.0, 1.0)),
        (np.r_[np.zeros(6), -0.2, np.zeros(5)], (-9.0, 9.0)),
        (np.r_[np.zeros(6), 5.0, np.zeros(5)], (-9.0, 9.0)),
    ):
        half = stats.t.ppf(0.975, 5) * clustered_se(values, cluster)
        expected = max(values.mean() - half, clip[0]), min(values.mean() + half, clip[1])
        assert score_interval(values, cluster) == pytest.approx(expected)
        assert score_interval(values, cluster * 0) == ((0.0, 1.0) if clip[0] == 0 else (-math.inf, math.inf))


@pytest.mark.parametrize(
    ("clusters", "same", "known"),
    [(20, 10, True), (20, 11, True), (20, 12, True), (20, 13, False), (10, 5, True), (10, 6, False), (2, 2, False)],
)
def test_a_jackknife_over_clusters_of_equal_influence_has_no_ends(clusters: int, same: int, known: bool) -> None:
    """With at most half of the clusters alike, or eight others, it has; a difference below nine digits is none."""
    sizes = np.arange(clusters) % 3 + 1
    cluster = np.arange(clusters).repeat(sizes)
    for unit, noise in ((1.0, 1e-11), (1e6, 1e-5)):
        shares = np.r_[np.full(same, 0.9) + noise / unit * np.arange(same), 0.9 + 0.01 * np.arange(1, clusters - same + 1)] * unit
        values = shares[cluster]
        half = stats.t.ppf(0.975, effective_clusters(sizes) - 1 if clusters > 2 else 1) * clustered_se(values, cluster)
        low, high = (values.mean() - half, values.mean() + half) if known else (-math.inf, math.inf)
        assert interval("bleu", values, cluster) == pytest.approx((low, high))
        assert interval("f1", values, cluster) == pytest.approx((max(low, 0.0), min(high, 1.0)))


def test_what_a_metric_is_over_items() -> None:
    values, words, cluster = np.array([-1.0, -3, -2, -6]), np.array([1.0, 2, 1, 2]), np.array([0, 0, 1, 2])
    assert score(None, values) == score("f1", values) == score(None, values, words) == -3
    assert score("perplexity", values, words) == pytest.approx(math.exp(12 / 6))
    assert interval(None, values, cluster) == score_interval(values, cluster)
    assert interval("perplexity", values, cluster, words) == ratio_interval("perplexity", values, words, cluster)
    assert brier_score(1, [0.2, 0.5, 0.3]) == pytest.approx(0.04 + 0.25 + 0.09)


def test_mde_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(6)
    d = rng.normal(0, 0.5, 200)
    pair = paired(np.zeros(200), d)
    mde = pair.mde()
    assert mde is not None
    found = np.mean([paired(np.zeros(200), rng.normal(mde, 0.5, 200)).p <= 0.05 for _ in range(400)])
    assert found == pytest.approx(0.8, abs=0.06)
    assert pair.needs(mde / 2) == pytest.approx(800, abs=2)
    strict = pair.changes.critical(0.01)
    for critical in (strict, pair.changes.critical(0.05)):
        assert pair.mde(critical) == pytest.approx((pair.changes.as_t(critical) + stats.norm.ppf(0.8)) * pair.se, rel=1e-4)
    assert pair.mde(pair.changes.critical(0.05)) == mde
    assert (pair.mde(math.inf), pair.needs(mde, math.inf)) == (None, None)
    assert (pair.needs(0.0), pair.needs(-1.0)) == (None, None)
    assert pair.needs(mde / 3, strict) == math.ceil(200 * (3 * pair.mde(strict) / mde) ** 2)  # type: ignore[operator]
    one = paired([0, 1, 0], [1, 1, 1], [0, 0, 0])
    assert (one.se, one.mde(), one.mde(0.5)) == (math.inf, None, None)
    free = paired([0, 3, 0], [1, 1, 1], [0, 0, 0])
    for critical in (0.5, one.changes.critical(0.05), math.inf):  # one cluster shows nothing
        assert one.within(critical, rejected=False) == (-1.0, 1.0)
        assert free.within(critical, rejected=False) == (-math.inf, math.inf)
    gained = paired(np.zeros(30), np.r_[np.ones(20), np.zeros(10)])
    assert gained.within(math.inf, rejected=True) == (pytest.approx(1e-12), 1.0)
    few = paired(d[:14] * 0, d[:14], (np.arange(14) % 3).tolist())  # 14 * 20 / 3 items would have twenty clusters
    assert (few.clusters, few.needs(1e6)) == (3, 94)


def test_pairs_tested_together_have_their_own_p() -> None:
    """Over the same clusters, in one pass over the patterns; the rest of each pair stays."""
    rng = np.random.default_rng(9)
    before, cluster = rng.random(60), (np.arange(60) // 5).tolist()
    pairs = [paired(before, before + rng.normal(shift, 0.3, 60), cluster) for shift in (0.0, 0.1, 0.3)]
    assert together_of([]) == []
    for alone, together in zip(pairs, together_of(pairs), strict=True):
        assert together.changes.tested == pytest.approx(alone.changes.flipped)
        assert replace(alone.changes, tested=0.625).flipped == 0.625
        assert (together.diff, together.se, together.changes.sums is alone.changes.sums) == (alone.diff, alone.se, True)


def test_resampling_is_seeded_and_paired() -> None:
    values = np.random.default_rng(0).random((2, 30))
    cluster = np.arange(30) // 3
    first = resampled_means(values, cluster, seed=7)
    assert np.array_equal(first, resampled_means(values, cluster, seed=7))
    assert first.shape == (2, 2000)
    assert np.allclose(resampled_means(values[:1], cluster, seed=7)[0], first[0], atol=1e-12)
    assert codes(["b", "a", "b"]).tolist() == [0, 1, 0]


def test_a_mean_over_tasks_by_hand() -> None:
    """Sums over the items of both tasks, each item weighted so that tasks count alike, differences times their task's factor."""
    rng, sizes, factors = np.random.default_rng(11), (30, 90), (1.5, 1.0)
    pairs, items, weights = [], [], []
    for n, factor in zip(sizes, factors, strict=True):
        before, after = ((rng.random(n) < share) * 1.0 for share in (0.6, 0.4))
        pairs.append(paired(before, after, (np.arange(n) // 3).tolist()))
        items.append(factor * (after - before))
        weights.append(np.full(n, 120 / 2 / n))
    d, w = np.concatenate(items), np.concatenate(weights)
    found = pooled([pair.changes for pair in pairs], factors).bounded
    assert found is not None
    assert (found.span, found.answers) == (1.5, True)
    assert found.rise == pytest.approx((w * d)[d > 0].sum())
    assert found.fall == pytest.approx(-(w * d)[d < 0].sum())
    assert (found.squares, found.plain, found.units) == pytest.approx(((w**2 * d**2).sum(), (w**2 * d).sum(), (w**2).sum()))
    assert found.spread == pytest.approx(sum((v**2 * (x - x.mean()) ** 2).sum() for v, x in zip(weights, items, strict=True)))
    assert found.variance == pytest.approx(sum((120 / 2 * f * pair.se) ** 2 for f, pair in zip(factors, pairs, strict=True)))
