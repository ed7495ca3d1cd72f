"""Differences of metrics that are ratios of sums, such as perplexities: against lm-eval, jackknives, ellipses and bootstraps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from workbench.scores.paired import paired, paired_ratio, paired_scores
from workbench.scores.signflips import PATTERNS
from workbench.scores.statistics import clustered_rates, ratio, ratio_interval


def texts(rng: np.random.Generator, n: int, per: int, gain: float = 0.0) -> tuple[Any, Any, Any, Any]:
    """Log-likelihoods of the same texts under two models, words, clusters."""
    words, cluster = rng.integers(5, 300, n).astype(float), np.arange(n) // per
    rate = 2 + 0.3 * rng.normal(size=n) + 0.2 * rng.normal(size=n // per)[cluster]
    other = rate - gain + 0.1 * rng.normal(size=n) + 0.05 * rng.normal(size=n // per)[cluster]
    return -rate * words, -other * words, words, cluster


def test_ratios_are_those_of_lm_eval() -> None:
    from lm_eval.api.metrics import bits_per_byte, perplexity, weighted_perplexity

    a, _, words, _ = texts(np.random.default_rng(0), 20, 1)
    rows = list(zip(a.tolist(), words.tolist(), strict=True))
    assert ratio("weighted_perplexity", a, words) == pytest.approx(weighted_perplexity(rows))
    assert ratio("bits_per_byte", a, words) == pytest.approx(bits_per_byte(rows))
    assert ratio("perplexity", a / 100, np.ones(20)) == pytest.approx(perplexity((a / 100).tolist()))
    assert ratio("perplexity", [-1000.0], [1.0]) == pytest.approx(math.exp(700))  # still a number
    with pytest.raises(ValueError, match="expected one of perplexity, weighted_perplexity, bits_per_byte"):
        ratio("bleu", a, words)


def test_error_of_a_ratio_is_the_jackknife() -> None:
    from scipy.stats import t

    a, b, words, cluster = texts(np.random.default_rng(1), 90, 3, gain=0.1)
    left_out = np.array([[ratio("bits_per_byte", x[cluster != c], words[cluster != c]) for c in range(30)] for x in (a, b)])
    effective = words.sum() ** 2 / (np.bincount(cluster, words) ** 2).sum()
    q = t.ppf(0.975, effective - 1)
    error = math.sqrt(29 / 30 * ((left_out[0] - ratio("bits_per_byte", a, words)) ** 2).sum())
    value = ratio("bits_per_byte", a, words)
    assert ratio_interval("bits_per_byte", a, words, cluster) == pytest.approx((value - q * error, value + q * error))
    pair = paired_ratio("bits_per_byte", a, b, words, cluster.tolist())
    gaps = left_out[1] - left_out[0] - pair.diff
    assert pair.se == pytest.approx(math.sqrt(29 / 30 * (gaps**2).sum()))
    assert pair.changes.critical(0.05) == pytest.approx(q * math.sqrt(effective / (effective - 1 + q * q)))
    assert pair.interval() == pytest.approx((pair.diff - q * pair.se, pair.diff + q * pair.se))
    assert pair.p == pytest.approx(2 * t.sf(abs(pair.diff) / pair.se, effective - 1), abs=0.01)


@pytest.mark.parametrize(("n", "per"), [(60, 5), (120, 4)])
def test_equal_weights_are_a_mean(n: int, per: int) -> None:
    """One unit a text: bits are then a mean over items, and both classes say the same."""
    a, b, _, cluster = texts(np.random.default_rng(2), n, per, gain=0.02)
    one = paired_ratio("bits_per_byte", a, b, np.ones(n), cluster.tolist())
    mean = paired(-a / math.log(2), -b / math.log(2), cluster.tolist())
    for name in ("diff", "se", "p", "wins", "losses", "clusters"):
        assert getattr(one, name) == pytest.approx(getattr(mean, name))
    for level in (0.05, 0.01):
        assert one.interval(level) == pytest.approx(mean.interval(level))
    assert one.mde() == pytest.approx(mean.mde())
    assert one.needs(0.01) == mean.needs(0.01)


def test_interval_of_perplexities_agrees_with_its_test() -> None:
    rng, found = np.random.default_rng(3), set()
    for n, per in ((40, 4), (60, 4), (100, 5), (240, 4)):
        for _ in range(40):
            a, b, words, cluster = texts(rng, n, per, gain=rng.choice([0.0, 0.05, 0.1]))
            pair = paired_ratio("weighted_perplexity", a, b, words, cluster.tolist())
            for level in (0.05, 0.01, 0.05 / 24):
                low, high = pair.interval(level)
                assert (pair.p <= level) == (low > 0 or high < 0)
                assert low <= pair.diff <= high
                found.add(pair.p <= level)
    assert found == {True, False}


@pytest.mark.parametrize("seed", range(12))
def test_interval_of_perplexities_is_the_range_over_the_ellipse(seed: int) -> None:
    """Every direction tried: with errors of both rates, with the same shift of all texts, and with one rate that has no error."""
    a, b, words, cluster = texts(np.random.default_rng(seed), 60, 3, gain=0.1)
    b = (b, a - 0.1 * words, -2.0 * words)[seed % 3]
    pair = paired_ratio("weighted_perplexity", a, b, words, cluster.tolist())
    rates, covariance, _ = clustered_rates(np.stack([-a, -b]), words, cluster)
    values, vectors = np.linalg.eigh(covariance)
    angle, critical = np.linspace(0, 2 * np.pi, 40_001), pair.changes.critical(0.05)
    radius = pair.changes.as_t(critical) * np.sqrt(values.clip(0))
    starts, ends = rates[:, None] + vectors @ (radius[:, None] * [np.cos(angle), np.sin(angle)])
    changes, shifts = np.exp(ends) - np.exp(starts), ends - starts
    found = pair.within(critical, bool(shifts.min() > 0 or shifts.max() < 0))
    slopes = np.exp(rates) * (-1, 1)
    assert pair.se == pytest.approx(math.sqrt(slopes @ covariance @ slopes))
    assert found == pytest.approx((changes.min(), changes.max()), rel=2e-5)


@pytest.mark.parametrize("kind", ["weighted_perplexity", "bits_per_byte"])
def test_a_critical_value_beyond_all_t_leaves_no_bound_but_the_verdict(kind: str) -> None:
    """As with a few texts much longer than the others: the interval still excludes 0 exactly if the test rejected."""
    a, b, words, cluster = texts(np.random.default_rng(6), 60, 3, gain=0.5)
    for first, second, expected in ((a, b, (-math.inf, -1e-12)), (b, a, (1e-12, math.inf))):
        pair = paired_ratio(kind, first, second, words, cluster.tolist())
        assert pair.within(math.inf, rejected=False) == (-math.inf, math.inf)
        assert pair.within(math.inf, rejected=True) == expected


def test_sizes_of_a_difference_in_nats() -> None:
    """What a change of a perplexity by some size is to its rate; no perplexity falls by all of its value."""
    a, b, words, _ = texts(np.random.default_rng(7), 30, 3)
    pair, before = paired_ratio("weighted_perplexity", a, b, words), ratio("weighted_perplexity", a, words)
    nats = [
        pair._units(size, side) for size, side in ((2 * before, 1), (before, 1), (before / 2, -1), (before, -1), (2 * before, -1))
    ]
    assert nats == pytest.approx([math.log(3), math.log(2), math.log(2), math.inf, math.inf])
    assert paired_ratio("bits_per_byte", a, b, words)._units(3.0, -1) == pytest.approx(3 * math.log(2))


def test_interval_of_perplexities_is_near_a_bootstrap_where_clusters_are_many() -> None:
    rng = np.random.default_rng(4)
    a, b, words, cluster = texts(rng, 1200, 3, gain=0.3)
    draws = rng.multinomial(400, np.full(400, 1 / 400), 4000)
    sums = [draws @ np.bincount(cluster, x) / (draws @ np.bincount(cluster, words)) for x in (a, b)]
    expected = np.percentile(np.exp(-sums[1]) - np.exp(-sums[0]), (2.5, 97.5))
    low, high = paired_ratio("weighted_perplexity", a, b, words, cluster.tolist()).interval()
    assert (low, high) == pytest.approx(tuple(expected), rel=0.02)


def test_what_the_kind_of_a_metric_decides() -> None:
    """A mean has the range of its scores, a contribution to a metric of a whole corpus has none, and weights make a ratio."""
    a, b, words, _ = texts(np.random.default_rng(8), 30, 3)
    before, after = (np.round(np.random.default_rng(seed).random(30)) for seed in (1, 2))
    cluster = (np.arange(30) // 3).tolist()
    mean = paired_scores(None, before, after, cluster, words, span=2.0, worst=0.3)
    assert (mean.changes.bounded.span, mean.changes.worst, mean.clusters) == (2.0, 0.3, 10)  # type: ignore[union-attr]
    corpus = paired_scores("f1", before, after, cluster, span=2.0, worst=0.3)
    assert (corpus.changes.bounded, corpus.changes.worst, corpus.diff) == (None, 0.3, mean.diff)
    perplexity = paired_scores("perplexity", a, b, cluster, words, worst=0.3)
    assert perplexity.diff == pytest.approx(ratio("perplexity", b, words) - ratio("perplexity", a, words))
    assert perplexity.changes.worst == pytest.approx(math.log(1 + 0.3 / ratio("perplexity", a, words)))


def test_ratios_without_spread_or_clusters() -> None:
    a, _, words, cluster = texts(np.random.default_rng(5), 60, 2)
    same = paired_ratio("perplexity", a, a, words, cluster.tolist())
    assert same.unchanged
    assert (same.p, same.interval(), same.mde()) == (1.0, (0.0, 0.0), None)
    for tiny in (1e-12, -1e-12):
        assert paired_ratio("perplexity", np.zeros(9), np.full(9, tiny), np.ones(9)).unchanged
    single = [x.astype(np.float32) for x in (a, a / 3)]  # differences are those of the numbers in double precision
    sums, double = (paired_ratio("perplexity", *x, words).changes.sums for x in (single, [x.astype(float) for x in single]))
    assert sums.tolist() == double.tolist()
    alike = paired_ratio("perplexity", a, a - 0.1 * words, words, cluster.tolist())  # every cluster 0.1 nats a word worse
    low, high = alike.interval()
    assert alike.p == pytest.approx(0.5 / PATTERNS)
    assert 0 < low < alike.diff < high
    assert ratio_interval("perplexity", a, words, np.zeros(60, int)) == (1.0, math.inf)
    one = paired_ratio("perplexity", a, a - 1, words, [0] * 60)
    assert one.interval() == one.within(0.5, rejected=False) == (-math.inf, math.inf)
    assert one.se == math.inf
    for wrong in ((a, a[:1], words), (a, a, words[:1]), (a[:0], a[:0], words[:0])):
        with pytest.raises(ValueError, match="expected paired items"):
            paired_ratio("perplexity", *wrong)
    with pytest.raises(ValueError, match="59 cluster labels"):
        paired_ratio("perplexity", a, a, words, cluster.tolist()[1:])
