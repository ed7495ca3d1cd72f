"""How well neurons tell a function's texts from others, and the test of which neurons serve a function.

Average precision and the area under the ROC curve follow scikit-learn's definitions: equal scores form one threshold.
AP = Σₙ (Rₙ − Rₙ₋₁) Pₙ over thresholds in descending order; AUC is the probability that a positive item has a higher score than a negative
one, with ties counted as one half.

The test is one permutation test over tasks, whose error rate holds for the whole model. The texts of a task are alike, so that a neuron that
recognizes the wording of one task tells its function from others. The units of the test are therefore whole tasks, and each draw assigns
them to the functions anew. The best of many thousand neurons is far above chance in every draw, so that a neuron is found only if its effect
exceeds the largest effect of all neurons on all functions in 95 % of the draws. Neurons that are found leave the comparison, which is then
repeated (step-down max-T: Westfall and Young 1993; Romano and Wolf 2005).

The statistic is the correlation of the logarithm of a neuron's mean activation on a task with the membership of the task in the function. It
orders neurons as Student's t does. Some tasks differ from the others in most neurons, such as those in another language, and would be taken
for a function: each task is therefore scaled by the size of its deviations over all neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Bools = NDArray[np.bool_]
ALPHA = 0.05
"""Probability that any neuron of the model is found for any function that it does not serve."""
DRAWS = 1000
"""Number of assignments of tasks to functions; the true one is the first."""
POWER = 0.9
"""Share of the neurons of some effect that are found, on average, from the effect on that results name."""
PLANNED = (4, 6, 8, 12, 16, 24, 32)
"""Tasks a function for which results say which effect could be found."""
_FLOOR = 0.1  # added to activations before the logarithm, as a share of the neuron's mean, since some are 0
_ROUNDS = 2  # of scaling neurons and tasks in turn
_TINY = 1e-12
_CHUNK = 1 << 23  # correlations at a time
_CLOSE = 1e-6  # correlations that are closer are equal in single precision


@dataclass(frozen=True)
class Ranked:
    """Ranks of items by descending score, from 1, for many units.

    Attributes:
        last: [units, items] int32: the worst rank among items with the same score.
        middle: [units, items] float64: the mean rank of items with the same score.
        ties: Whether any scores of a unit are equal.
    """

    last: NDArray[np.int32]
    middle: NDArray[np.float64]
    ties: bool

    @classmethod
    def of(cls, scores: NDArray[np.floating[Any]]) -> Ranked:
        """Rank the items of each unit.

        Args:
            scores: [items, units].

        Raises:
            ValueError: If a score is NaN.
        """
        if np.isnan(scores).any():
            raise ValueError("expected scores without NaN")
        rows = -np.ascontiguousarray(scores.T)
        order = np.argsort(rows, axis=1)
        ordered = np.take_along_axis(rows, order, 1)
        position = np.broadcast_to(np.arange(1, rows.shape[1] + 1, dtype=np.int32), rows.shape)
        begins = np.ones(rows.shape, bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        ties = not bool(begins.all())
        first = last = position
        if ties:
            ends = np.ones(rows.shape, bool)
            ends[:, :-1] = begins[:, 1:]
            first = np.maximum.accumulate(np.where(begins, position, 0), 1)
            last = np.minimum.accumulate(np.where(ends, position, rows.shape[1])[:, ::-1], 1)[:, ::-1]
        ranks, middle = np.empty(rows.shape, np.int32), np.empty(rows.shape)
        np.put_along_axis(ranks, order, last, 1)
        np.put_along_axis(middle, order, (first + last) / 2, 1)
        return cls(ranks, middle, ties)

    def average_precision(self, labels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the average precision [labels, units].

        A positive item at rank r, the k-th among the positive ones, adds k / r: the precision at its threshold.

        Args:
            labels: [labels, items]. Each label needs a positive item.
        """
        return np.stack([self._average_precision(label) for label in labels])

    def _average_precision(self, label: NDArray[np.bool_]) -> NDArray[np.float64]:
        ranks = np.sort(self.last[:, label], axis=1)
        count = ranks.shape[1]
        hits = np.broadcast_to(np.arange(1, count + 1, dtype=np.float64), ranks.shape)
        if self.ties:  # all positive items of one threshold count
            ends = np.ones(ranks.shape, bool)
            ends[:, :-1] = ranks[:, 1:] != ranks[:, :-1]
            hits = np.minimum.accumulate(np.where(ends, hits, count)[:, ::-1], 1)[:, ::-1]
        return np.asarray((hits / ranks).sum(1) / count)

    def auc(self, labels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the area under the ROC curve [labels, units].

        Args:
            labels: [labels, items]. Each label needs a positive and a negative item.
        """
        n, positives = labels.shape[1], labels.sum(1, dtype=np.float64)[:, None]
        # Items below each positive item, ties counted as one half, without the positive items among them.
        beaten = n * positives - labels.astype(np.float64) @ self.middle.T - positives * (positives - 1) / 2
        return np.asarray(beaten / (positives * (n - positives)))


@dataclass(frozen=True)
class TaskTest:
    """The neurons that the test finds.

    Attributes:
        effects: Per site, how far the logarithm of a neuron's mean activation on the function's tasks is above that on other tasks, in standard
            deviations over tasks [functions, units].
        found: Per site, whether the neuron is found for the function [functions, units].
        smallest: Effect of which POWER of the neurons would be found [functions]; infinite if no effect could be found.
        sizes: Number of tasks of each function [functions].
        planned: Tasks a function -> the same effect with so many tasks of every function.
    """

    effects: list[Floats]
    found: list[Bools]
    smallest: Floats
    sizes: NDArray[np.intp]
    planned: dict[int, float]


def task_test(means: Sequence[NDArray[Any]], owners: NDArray[np.intp], *, seed: int = 0, alpha: float = ALPHA) -> TaskTest:
    """Test all neurons for all functions.

    Args:
        means: Per site, mean activation of every neuron on every task [tasks, units].
        owners: Function of each task [tasks], from 0.
        seed: Seed of the draws.
        alpha: Error rate of the family of all neurons and functions.
    """
    sizes = np.bincount(owners)
    tested = [f for f in range(len(sizes)) if _least_p(f, sizes) <= alpha]
    standard = _standard(means)
    rng = np.random.default_rng(seed)
    draws = np.stack([owners, *(rng.permutation(owners) for _ in range(DRAWS - 1))])
    every = _weights(owners[None], range(len(sizes)))[0]
    observed = [every @ of_site for of_site in standard]
    found, limit = [np.zeros(of_site.shape, bool) for of_site in observed], 1.0
    untested = [f for f in range(len(sizes)) if f not in tested]
    left = [np.ones(of_site.shape[1], bool) for of_site in observed]
    while tested and any(of_site.any() for of_site in left):
        largest = np.max([_largest(z[:, own], draws, tested) for z, own in zip(standard, left, strict=True) if own.any()], 0)
        limit = float(np.sort(largest)[DRAWS - 1 - math.floor(alpha * DRAWS)]) + _CLOSE
        more = [(r > limit) & own for r, own in zip(observed, left, strict=True)]
        for of_site in more:
            of_site[untested] = False
        if not any(of_site.any() for of_site in more):
            break
        found = [own | new for own, new in zip(found, more, strict=True)]
        left = [np.asarray(~own.any(0)) for own in found]
    tasks, functions = int(sizes.sum()), len(sizes)
    tail = _tail(limit, tasks) if limit < 1 else alpha / (functions * sum(r.shape[1] for r in observed))
    smallest = np.array([findable(tail, int(size), tasks) for size in sizes])
    smallest[untested if limit < 1 else slice(None)] = np.inf
    planned = {n: findable(tail, n, n * functions) if _least_p(0, np.full(functions, n)) <= alpha else np.inf for n in PLANNED}
    return TaskTest([_effects(r, sizes) for r in observed], found, smallest, sizes, planned)


def findable(tail: float, size: int, tasks: int) -> float:
    """Return the effect of which POWER of the neurons exceed a limit, in standard deviations over tasks; infinite if there is none.

    A neuron whose true effect equals the limit exceeds it in one of two samples of tasks, so the limit itself is no such effect. The statistic of a
    neuron with effect d has the noncentral t distribution with tasks − 2 degrees of freedom and noncentrality d·√(size·(tasks − size)/tasks).

    Args:
        tail: Probability that the statistic of one neuron without an effect exceeds the limit.
        size: Tasks of the function.
        tasks: Tasks of all functions.
    """
    from scipy.optimize import brentq
    from scipy.special import nctdtr, stdtrit

    freedom = tasks - 2
    if freedom < 1 or not 0 < size < tasks:
        return math.inf
    limit = -float(stdtrit(freedom, tail))

    def lacking(mean: float) -> float:
        return POWER - 1 + float(nctdtr(freedom, mean, limit))

    highest = limit + 10.0
    while lacking(highest) > 0:
        highest *= 2
    return float(brentq(lacking, 0, highest)) * math.sqrt(tasks / (size * (tasks - size)))


def _tail(limit: float, tasks: int) -> float:
    """Return the probability that the correlation of one neuron without an effect exceeds a limit."""
    from scipy.special import stdtr

    return float(stdtr(tasks - 2, -limit * math.sqrt((tasks - 2) / (1 - limit**2))))


def _least_p(function: int, sizes: NDArray[np.intp]) -> float:
    """Return the p value of a neuron that tells a function's tasks from all others: the share of draws in which some function gets these tasks.

    A function with one task has no value below 1, since its neurons cannot be told from those of the task's wording.
    """
    size = int(sizes[function])
    return int((sizes == size).sum()) / math.comb(int(sizes.sum()), size) if size > 1 else 1.0


def _standard(means: Sequence[NDArray[Any]]) -> list[Singles]:
    """Return the logarithms of mean activations with tasks scaled, and over tasks mean 0 and norm 1 [tasks, units].

    A neuron whose activations are all equal, or not all finite, has zeros.
    """
    with np.errstate(invalid="ignore"):
        logs = [np.log(of_site / np.maximum(of_site.mean(0, dtype=np.float64), _TINY) + _FLOOR) for of_site in means]
    for x in logs:
        x[:, ~np.isfinite(x).all(0)] = 0
    scale = np.ones((len(means[0]), 1))
    for _ in range(_ROUNDS):
        squares = sum((_unit(_centered(x, scale)) ** 2).sum(1, keepdims=True) for x in logs)
        scale *= np.where(squares > 0, np.sqrt(squares / max(float(np.mean(squares)), _TINY)), 1)
    return [np.asarray(_unit((scaled := _centered(x, scale)) - scaled.mean(0)), np.float32) for x in logs]


def _centered(values: Floats, scale: Floats) -> Floats:
    """Return values without their mean over tasks, in units of the tasks' scales, by which the mean is weighted."""
    weights = scale**-2 / (scale**-2).sum()
    return np.asarray((values - (weights * values).sum(0)) / scale)


def _unit(values: Floats) -> Floats:
    """Return values with norm 1 over tasks."""
    norms = np.linalg.norm(values, axis=0)
    return np.asarray(values / np.where(norms > _TINY, norms, np.inf))


def _weights(draws: NDArray[np.intp], functions: Sequence[int]) -> Singles:
    """Return the weights of tasks whose sums are correlations [draws, functions, tasks]."""
    member = draws[:, None] == np.asarray(functions)[:, None]
    size, tasks = member[0].sum(1)[:, None], draws.shape[1]
    return np.asarray(member / np.sqrt(size * (tasks - size) / tasks), np.float32)


def _largest(standard: Singles, draws: NDArray[np.intp], functions: Sequence[int]) -> Singles:
    """Return the largest correlation of some neurons [tasks, units] with the functions, by draw."""
    step = max(1, _CHUNK // (len(functions) * standard.shape[1]))
    parts = (_weights(draws[start : start + step], functions) @ standard for start in range(0, len(draws), step))
    return np.concatenate([r.max((1, 2)) for r in parts])


def _effects(correlations: NDArray[Any], sizes: NDArray[np.intp]) -> Floats:
    """Return correlations [functions, units] as differences of means in standard deviations within the groups."""
    r, size, tasks = np.clip(np.asarray(correlations, np.float64), -1 + _CLOSE, 1 - _CLOSE), sizes[:, None], sizes.sum()
    return np.asarray(r * np.sqrt((tasks - 2) * tasks / (size * (tasks - size) * (1 - r**2))))
