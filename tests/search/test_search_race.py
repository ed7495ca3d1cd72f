"""Differences between candidates, when one is given up, and what it counts then: against independent computations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import stdtrit

from workbench.evaluate.models import GOLD
from workbench.scores.paired import paired
from workbench.search.clock import Clock
from workbench.search.objective import Answers, Objective, Rival, Term, beaten_by, estimate, front, gap, gold_gap
from workbench.search.winner import area

A, B = ("s", "a"), ("s", "b")
BOTH = Objective("s", (Term(A, "acc", 1.0), Term(B, "acc", 1.0)))
ALONE = Objective("s/a", (Term(A, "acc", 1.0),))
LOSS = Objective("s/a/loss", (Term(A, "loss", -1.0),))


def answers(a: Sequence[float], b: Sequence[float] = (), **more: Sequence[float]) -> Answers:
    """Every item is a cluster of its own."""
    scores: dict[Any, dict[str, Any]] = {A: {"acc": np.array(a, float), **{k: np.array(v, float) for k, v in more.items()}}}
    clusters = {A: [str(i) for i in range(len(a))]}
    if len(b):
        scores[B] = {"acc": np.array(b, float)}
        clusters[B] = [str(i) for i in range(len(b))]
    return Answers(scores, clusters)


def drawn(seed: int, share: float, n: int = 60) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_gap_is_the_paired_difference() -> None:
    """The same test and interval as those of `compare`; scores without bounds have the interval of the paired t test."""
    before, after = drawn(0, 0.4), drawn(1, 0.7)
    found, pair = gap(answers(before), answers(after), ALONE), paired(before, after)
    assert found.diff == pytest.approx(after.mean() - before.mean())
    assert (found.p, found.interval(), found.clusters) == (pair.p, pair.interval(), 60)
    assert found.verdict() == "better"
    assert found.reason() is None
    one, two = (np.random.default_rng(seed).normal(-1, 0.3, 60) for seed in (7, 8))
    loss = gap(answers([0.0] * 60, loss=-one), answers([0.0] * 60, loss=-two), LOSS)
    assert loss.interval() == pytest.approx(tuple(stats.ttest_rel(two, one).confidence_interval(0.95)))


def test_gap_of_several_tasks() -> None:
    """The mean of the tasks' differences, tested by flipping the signs of the clusters of all tasks: here against random flips of our own."""
    parts = [(drawn(2, 0.5), drawn(3, 0.6)), (drawn(4, 0.3, 40), drawn(5, 0.3, 40))]
    (a1, a2), (b1, b2) = parts
    found = gap(answers(a1, b1), answers(a2, b2), BOTH)
    assert found.diff == pytest.approx(np.mean([y.mean() - x.mean() for x, y in parts]))
    assert found.clusters == 40
    assert answers(a1, b1).value(BOTH) == pytest.approx((a1.mean() + b1.mean()) / 2)
    one = gap(answers(a1, b1), answers(a2, b1), BOTH)
    assert (one.unchanged, one.diff) == (False, pytest.approx((a2.mean() - a1.mean()) / 2)), "one task of two has changed"
    shares = np.concatenate([(y - x) / len(x) / 2 for x, y in parts])
    flips = np.abs(np.random.default_rng(0).choice([-1, 1], (100_000, 100)) @ shares)
    p = ((flips > abs(found.diff) + 1e-9).mean() + (flips > abs(found.diff) - 1e-9).mean()) / 2
    assert found.p == pytest.approx(p, abs=0.01)
    low, high = found.interval()
    errors = [np.std(y - x, ddof=1) / np.sqrt(len(x)) for x, y in parts]
    half = stats.t.ppf(0.975, 59 + 39) * np.hypot(*errors) / 2
    assert (low, high) == pytest.approx((found.diff - half, found.diff + half), abs=0.1 * half), (
        "near the interval by Student's t"
    )


def test_only_items_that_both_have_seen_count() -> None:
    before, after = drawn(0, 0.5), drawn(1, 0.5)
    found, cut = (gap(answers(x), answers(after[:25]), ALONE) for x in (before, before[:25]))
    assert (found.diff, found.p, found.interval(), found.clusters) == (cut.diff, cut.p, cut.interval(), 25)
    assert found.diff == pytest.approx(after[:25].mean() - before[:25].mean())


def test_nothing_changed_and_all_changed_alike() -> None:
    same = answers([1, 0] * 10)
    alike = gap(same, same, ALONE)
    assert (alike.diff, alike.p, alike.interval()) == (0.0, 1.0, (0.0, 0.0))
    assert alike.verdict() == "no item changed"
    assert not alike.below()
    every = gap(answers([0.0] * 20), answers([1.0] * 20), ALONE)
    low, high = every.interval()
    assert (every.diff, every.verdict()) == (1.0, "better")
    t2 = float(stdtrit(19, 0.975)) ** 2
    assert (low, high) == pytest.approx(((20 - t2) / (20 + t2), 1.0)), "Tango's interval of 20 rises and no fall"
    few = gap(answers([0, 0, 0, 0, 0, 0, 0]), answers([1, 1, 1, 1, 1, 1, 1]), ALONE)
    assert few.p < 0.05
    assert (few.verdict(), few.reason()) == ("cannot tell", "too few clusters: 7, at least 8 needed")
    assert gap(answers([0] * 8), answers([1] * 8), ALONE).verdict() == "better"
    noise = gap(answers([0.0] * 60), answers([9e-13] * 60), ALONE)
    assert (noise.unchanged, noise.diff, noise.p) == (True, 0.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_gap_below_zero_is_one_whose_interval_is(seed: int) -> None:
    """Giving up, interval and verdict rest on one test."""
    found = gap(answers(drawn(seed, 0.6, 30)), answers(drawn(seed + 100, 0.35, 30)), ALONE)
    assert found.below() == (found.interval()[1] < 0) == (found.verdict() == "worse")
    assert (found.reason() == "the interval includes 0") == (found.verdict() == "cannot tell")


def test_less_is_better() -> None:
    low, high = answers([0.0], loss=[1.0]), answers([0.0], loss=[3.0])
    assert (low.value(LOSS), LOSS.shown(low.value(LOSS))) == (-1.0, 1.0)
    assert gap(high, low, LOSS).diff == 2.0
    assert front([Rival.of("high", high, [LOSS]), Rival.of("low", low, [LOSS])])[0].name == "low"


def test_front() -> None:
    points = {"a": (1, 0), "b": (0, 1), "c": (0.5, 0.5), "d": (0.4, 0.4), "e": (0.5, 0.5), "f": (1, 0.5)}
    found = front(Rival(name, answers([0]), scores) for name, scores in points.items())
    assert [r.name for r in found] == ["b", "f"]
    assert [r.name for r in front(Rival(n, answers([0]), (s,)) for n, s in [("x", 1), ("y", 2), ("z", 2)])] == ["y"], (
        "of equals the first"
    )


def test_given_up_and_what_it_counts() -> None:
    best = Rival.of("best", answers(drawn(0, 0.9, 200)), [ALONE])
    worse, alike = answers(drawn(1, 0.2, 25)), answers(best.answers.scores[A]["acc"][:25])
    assert beaten_by(worse, [best], [ALONE], gold=False) is best
    assert beaten_by(alike, [best], [ALONE], gold=False) is None
    (value,) = estimate(worse, best, [ALONE])
    first = best.answers.scores[A]["acc"][:25]
    assert value == pytest.approx(best.scores[0] + worse.scores[A]["acc"].mean() - first.mean())
    assert estimate(alike, best, [ALONE]) == [best.scores[0]]


def test_gold_tells_earlier() -> None:
    """A log-probability that is lower on every item gives up what right and wrong cannot tell apart yet; not what scores better."""
    acc, gold = drawn(0, 0.6, 25), np.random.default_rng(1).normal(-1, 0.3, 25)
    best = Rival.of("best", answers(acc, gold=gold), [ALONE])
    worse = acc.copy()
    worse[np.flatnonzero(acc)[0]] = 0
    lower = gold - np.random.default_rng(2).random(25)
    found = gold_gap(best.answers, answers(worse, gold=lower), [ALONE], GOLD)
    assert found is not None
    assert found.interval()[1] < 0
    assert beaten_by(answers(worse, gold=lower), [best], [ALONE], gold=True) is best
    assert beaten_by(answers(worse, gold=lower), [best], [ALONE], gold=False) is None
    better = acc.copy()
    better[np.flatnonzero(acc == 0)[0]] = 1
    assert beaten_by(answers(better, gold=lower), [best], [ALONE], gold=True) is None
    assert gold_gap(best.answers, answers(worse), [ALONE], GOLD) is None


def test_several_objectives_have_to_be_lost_all() -> None:
    two = [ALONE, Objective("s/b", (Term(B, "acc", 1.0),))]
    best = Rival.of("best", answers(drawn(0, 0.9), drawn(1, 0.5)), two)
    low, high = drawn(2, 0.1), drawn(3, 0.9)
    assert beaten_by(answers(low, high), [best], two, gold=False) is None
    assert beaten_by(answers(low, drawn(4, 0.05)), [best], two, gold=False) is best


def test_area() -> None:
    assert area([(1, 1), (2, 0.5), (0.5, 2)], (0, 0)) == pytest.approx(2 * 0.5 + 1 * 0.5 + 0.5 * 1)
    assert area([(1, 1), (0.5, 0.5)], (0, 0)) == 1
    assert area([(0, 1)], (0, 0)) == 0


def test_time_of_earlier_calls_counts(tmp_path: Any) -> None:
    with Clock(tmp_path, 100) as clock:
        clock._start -= 60
        clock.tick()
        assert not clock.over()
    with Clock(tmp_path, 100) as again:
        assert 60 <= again.spent < 62
        beside = Clock(tmp_path, 100)
        with beside:
            assert 60 <= beside.spent < 62, "a call that still runs does not count"
        again._start -= 41
        assert again.over()
        assert again.left(3, None) == ""
    with Clock(tmp_path, None) as third:
        third._start -= 600
        third.begin()
        third._begun -= 20
        third.tick(2)
        assert third.left(2, 6) == "40 s", "by the time since the first candidate; controls took ten minutes"
