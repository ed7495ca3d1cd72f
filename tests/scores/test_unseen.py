"""One unseen cluster and the skewness of the sample: exact values, independent counts, and what the functions must not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from workbench.scores.changes import Changes, Items
from workbench.scores.paired import paired, paired_ratio
from workbench.scores.signflips import skew_p, times_needed, unseen_p

NONE = Items(1.0, (0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize(("up", "down"), [(8, 2), (60, 20), (3, 0), (5, 9), (200, 100), (1000, 900)])
def test_equal_steps_give_the_sign_test(up: int, down: int) -> None:
    sums = np.r_[np.ones(up), -np.ones(down), np.zeros(7)]
    assert unseen_p(sums, 1.0) == pytest.approx(stats.binomtest(up, up + down, alternative="greater").pvalue, rel=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20, 72, 183])
def test_clusters_without_a_change_give_the_rule_of_three(k: int) -> None:
    """k clusters without a loss: (1 - bound)^k, Clopper and Pearson's level for no event of k."""
    assert unseen_p(np.full(k, 0.02), 0.98) == pytest.approx(0.98**k, rel=1e-4)
    assert unseen_p(np.full(1, 0.02), 0.98, times=k) == pytest.approx(0.98**k, rel=1e-4)


@pytest.mark.parametrize(("k", "size"), [(3, 1.3), (12, 0.4), (80, 2.0)])
def test_random_exponentials_agree(k: int, size: float) -> None:
    rng = np.random.default_rng(k)
    sums = rng.normal(size=k) + 1 / np.sqrt(k)
    drawn = np.exp(-np.maximum(rng.exponential(size=(200_000, k)) @ sums, 0) / size)
    assert unseen_p(sums, size) == pytest.approx(drawn.mean(), abs=5 * drawn.std() / 200_000**0.5)


def test_no_gain_shows_nothing() -> None:
    assert unseen_p(np.zeros(5), 1.0) == unseen_p(-np.ones(5), 1.0) == 1.0
    assert 0 <= unseen_p(np.array([1e9, -1e-9]), 1.0) < 1e-8
    assert unseen_p(np.full(3, 1e-9), 1.0) == pytest.approx(1.0, abs=1e-7)


def test_skewness_is_corrected_for_as_by_hand() -> None:
    """Nine clusters that lose a little and one that gains: the corrected t is Hall's cubic."""
    sums, sizes = np.r_[np.full(9, 0.11), -0.9], np.ones(10)
    rest = sums - sums.mean()
    t = sums.mean() / (sums.std(ddof=1) / 10**0.5)
    g = (rest**3).mean() / (rest**2).mean() ** 1.5 / 10**0.5
    corrected = t + g * t**2 / 3 + g / 6 + g**2 * t**3 / 27
    assert corrected * t < 0
    assert skew_p(sums, sizes) == 1.0  # the correction turns the sign
    high = sums + 0.3
    t = high.mean() / (high.std(ddof=1) / 10**0.5)
    corrected = t + g * t**2 / 3 + g / 6 + g**2 * t**3 / 27
    assert skew_p(high, sizes) == pytest.approx(2 * stats.t.sf(corrected, 9))
    assert skew_p(-high, sizes) == pytest.approx(skew_p(high, sizes))
    assert skew_p(np.ones(10), sizes) == 0.0  # no spread


def test_clusters_that_count_several_times_are_that_many_clusters() -> None:
    rng = np.random.default_rng(2)
    sums, sizes = rng.exponential(size=9) - 0.6, rng.integers(1, 5, 9).astype(float)
    for times in (2, 5):
        more = np.tile(sums, times), np.tile(sizes, times)
        assert skew_p(sums, sizes, times) == pytest.approx(skew_p(*more))
        assert unseen_p(sums, 1.5, times) == pytest.approx(unseen_p(more[0], 1.5), rel=1e-6)


def test_a_symmetric_sample_is_students_t() -> None:
    sums = np.r_[-1.0, -0.5, 0.5, 1.0] + 0.3
    t = 0.3 / (sums.std(ddof=1) / 2)
    assert skew_p(sums, np.ones(4)) == pytest.approx(2 * stats.t.sf(t, 3))


@pytest.mark.parametrize(("bound", "worst", "needed"), [(0.02, 1.0, 183), (0.02, 0.3, 54), (0.05, 1.0, 72), (0.05, 0.3, 21)])
def test_clusters_that_are_needed_without_a_change(bound: float, worst: float, needed: int) -> None:
    """The table of docs/evaluation-verdicts.md: one cluster fewer does not exclude the loss."""
    for k, excluded in ((needed - 1, False), (needed, True)):
        changes = paired(np.ones(k), np.ones(k), worst=worst).changes
        assert changes.excludes(bound, -1, 0.025) == excluded
    few = paired(np.ones(10), np.ones(10), worst=worst)
    assert few.needs_to_exclude(bound, -1, 0.025) == pytest.approx(needed, rel=0.03)


def test_a_gain_excludes_a_loss_and_a_loss_does_not() -> None:
    k = 400
    gained = paired(np.zeros(k), np.r_[np.ones(40), np.zeros(k - 40)])
    assert gained.excludes(0.0, -1, 0.025)
    assert gained.excludes(0.02, -1, 0.025)
    assert not gained.excludes(0.05, 1, 0.025)
    assert gained.excludes(1.0, 1, 0.025)  # no cluster changes more than the range
    assert gained.needs_to_exclude(0.05, 1, 0.025) is None  # the gain is larger than that
    assert gained.needs_to_exclude(0.12, 1, 0.025) is not None


def test_without_a_range_clusters_without_a_change_show_nothing() -> None:
    values, words = -np.linspace(10, 90, 40), np.full(40, 30.0)
    same = paired_ratio("weighted_perplexity", values, values, words)
    assert not same.excludes(0.5, 1, 0.025)
    assert paired_ratio("weighted_perplexity", values, values, words, worst=0.6).excludes(0.55, 1, 0.025)
    nudged = values + np.random.default_rng(0).normal(size=40) * 0.01
    near = paired_ratio("weighted_perplexity", values, nudged, words)
    assert near.excludes(0.5, 1, 0.025)
    assert near.excludes(0.5, -1, 0.025)
    assert not near.excludes(1e-4, -1, 0.025)
    assert near.excludes(1e9, -1, 0.025)  # no perplexity falls below 0
    before = same.diff + np.exp(-values.sum() / words.sum())
    bits = paired_ratio("bits_per_byte", values, values, words, worst=1.0).changes
    perplexity = paired_ratio("weighted_perplexity", values, values, words, worst=1.0).changes
    assert bits.worst == pytest.approx(np.log(2))
    assert perplexity.worst == pytest.approx(np.log(1 + 1 / before))
    fall, most = -np.log(1 - 0.02 / before), np.log(1 + 0.6 / before)  # k unchanged texts leave (1 - fall / most)^k
    needed = paired_ratio("weighted_perplexity", values, values, words, worst=0.6).needs_to_exclude(0.02, -1, 0.025)
    assert needed == pytest.approx(np.log(0.025) / np.log(1 - fall / most), rel=0.03)


def test_a_change_is_excluded_at_exactly_its_p() -> None:
    """By Hall's corrected t without a largest change, by one unseen cluster of effective size with one, and never on the side of the mean."""
    rng = np.random.default_rng(1)
    sums, sizes = rng.normal(0.02, 0.1, 20), rng.integers(1, 9, 20).astype(float)
    for side in (1, -1):
        short = 0.1 * sizes - side * sums
        unseen = unseen_p(short, 0.6 * float(sizes @ sizes) / sizes.sum())
        for changes, p in (
            (Changes(sums, sizes, NONE), skew_p(short, sizes) / 2),
            (Changes(sums, sizes, NONE, worst=0.7), unseen),
        ):
            assert 0 < p < 0.5
            assert changes.excludes(0.1, side, p)
            assert not changes.excludes(0.1, side, 0.999 * p)
    far = Changes(sums + 5 * sizes, sizes, NONE)
    assert (far.excludes(1.0, -1, 1e-6), far.excludes(1.0, 1, 0.5), far.excludes(math.inf, 1, 1e-6)) == (True, False, True)


def test_times_needed_is_the_smallest_multiple() -> None:
    assert times_needed(lambda times: 0.9**times, 0.9**50) == pytest.approx(50, rel=0.02)
    assert times_needed(lambda times: 1.0, 0.05) is None
