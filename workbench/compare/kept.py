"""Kept skill: the ratio of a configuration's chance-corrected score to its parents', if that ratio is meaningful.

The ratio of two scores has a finite confidence interval only if the denominator is clearly above 0: Fieller's interval (1954) is
unbounded as soon as g = (t * error / score)^2 of the denominator reaches 1, and far too wide before that. Finney (Probit Analysis, 1971)
seldom found a usable ratio with g above 0.4. Here the parent's 95 % interval may reach down to half of its corrected score, g = 1/4;
otherwise the ratio is withheld, with the reason.

The best parent of a task is chosen by its scores, and the highest of several scores is too high: of eight equal parents, a configuration that
keeps everything would seem to keep .92 to .97. So the parent is chosen on one half of the clusters and its score is taken from the other half,
both ways, over some splits; resampling chooses again in every draw (simulated in tests/scores/test_error_rates.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Measured, absent
from workbench.scores.signflips import TINY
from workbench.scores.statistics import MANY_CLUSTERS, Floats, expanded_tail, resampled_clusters
from workbench.scores.store import Configuration

_SPLITS = 5  # halves of the clusters on which the best parent is chosen
_LEAST = 0.5  # smallest ratio of the lower end of the parent's interval to its score, both corrected for chance


class Kept(JsonObject):
    """The share of its parents' skill that a configuration keeps, with its 95 % interval."""

    value: Measured
    """The share; null if it is withheld."""
    low: Measured
    """Lower end of the interval."""
    high: Measured
    """Upper end of the interval."""
    reason: str | None = absent()
    """Why the share is withheld."""


@dataclass(frozen=True)
class _Side:
    """A chance-corrected score with its 95 % interval, and the score under resampled clusters."""

    value: float
    low: float
    high: float
    draws: Floats


@dataclass(frozen=True)
class _Part:
    """A configuration and its best parent on one task; `correlation` is that of the two over clusters."""

    table: Table
    top: _Side
    bottom: _Side
    correlation: float

    @property
    def resampled(self) -> bool:
        """True if resampling shows the spread of both scores: there are enough clusters, and the scores are not all equal."""
        spread = min(float(np.ptp(side.draws)) for side in (self.top, self.bottom))
        return self.table.clusters >= MANY_CLUSTERS and spread > TINY


def kept_of(tasks: Sequence[Table], c: Configuration, parents: Mapping[str, str]) -> tuple[dict[str, Kept], Kept | None]:
    """Return the ratio of the corrected score to the best parent's, by task, and the ratio of the sums over these tasks.

    A skill task counts if its owner is a parent of `c`, or if it has no owner. If the best parent is too close to chance for a ratio, or
    chance is not known, the value is None and `reason` explains it.

    Args:
        tasks: Tasks on which the configuration was scored.
        c: The configuration.
        parents: Digest by name of its parents that were scored too.
    """
    kept: dict[str, Kept] = {}
    parts = []
    for t in tasks:
        owner = t.suite.owners.get(t.task)
        scored = {name: digest for name, digest in parents.items() if digest in t.values}
        if not t.skill or not scored or (owner is not None and owner not in c.parents):
            continue
        best = max(scored, key=lambda name: float(t.values[scored[name]].mean()))
        bottom = _best(t, scored[best], list(scored.values()))
        if reason := _too_near(t, best, scored[best], bottom):
            kept[t.name] = _withheld(reason)
            continue
        part = _part(t, c.digest, scored[best], bottom)
        kept[t.name] = _ratio([part])
        parts.append(part)
    if parts:
        return kept, _ratio(parts)
    reasons = {name: ratio.reason for name, ratio in kept.items()}
    return kept, _withheld("; ".join(f"{name}: {reason}" for name, reason in reasons.items())) if reasons else None


def _withheld(reason: str) -> Kept:
    return Kept(value=None, low=None, high=None, reason=reason)


def _too_near(t: Table, name: str, digest: str, side: _Side) -> str | None:
    """Return the reason why the parent's score is not a usable denominator, or None."""
    if t.chance is None:
        return f"the chance score of {t.name} is not known"
    if side.low >= _LEAST * side.value > 0 and side.draws.min() > 0:
        return None
    low, high = t.interval(digest)
    score = f"{100 * t.value(digest):.0f} [{100 * low:.0f}, {100 * high:.0f}] %"
    return f"its best parent, {name}, scores {score}, too close to chance ({100 * t.chance:.0f} %)"


def _side(t: Table, digest: str) -> _Side:
    low, high = t.interval(digest)
    return _Side(float(t.corrected(t.value(digest))), float(t.corrected(low)), float(t.corrected(high)), t.resampled[digest])


def _best(t: Table, best: str, parents: Sequence[str]) -> _Side:
    """Return the score of the best of some parents, without what the choice by the same items adds to it.

    The ends of the interval keep the distances that the parent with the highest score, `best`, has from its own.
    """
    own = _side(t, best)
    if len(parents) == 1:
        return own
    counts = np.vstack([np.ones(t.clusters), resampled_clusters(t.clusters, t.seed)])  # the first row is the score itself
    sums = np.stack([np.bincount(t.cluster, t.values[digest]) for digest in parents], 1)
    rng, total, taken = np.random.default_rng(t.clusters), counts @ sums, np.zeros(len(counts))
    for _ in range(_SPLITS):
        half = (counts * (rng.permutation(t.clusters) % 2)) @ sums
        for chosen_on, scored_on in ((half, total - half), (total - half, half)):
            first = chosen_on >= chosen_on.max(1, keepdims=True) - TINY * len(t.items)  # equal ones share
            taken += (scored_on * first).sum(1) / first.sum(1)
    means = t.corrected(taken / _SPLITS / (counts @ np.bincount(t.cluster)))
    value = float(means[0])
    return _Side(value, value - (own.value - own.low), value + (own.high - own.value), means[1:])


def _part(t: Table, digest: str, parent: str, bottom: _Side) -> _Part:
    sums = [np.bincount(t.cluster, t.values[d] - t.values[d].mean()) for d in (digest, parent)]
    scale = math.sqrt(float((sums[0] ** 2).sum() * (sums[1] ** 2).sum()))
    return _Part(t, _side(t, digest), bottom, float(sums[0] @ sums[1]) / scale if scale > TINY else 0.0)


def _ratio(parts: Sequence[_Part]) -> Kept:
    """Return the sum of the configuration's scores divided by the sum of its parents', with a 95 % interval.

    Clusters are resampled with the same draws for both; the percentiles are expanded to the t quantile of the task with the fewest
    effective clusters (Hesterberg 2015, expanded percentile). With fewer than 20 clusters, or if all scores of one side are equal, the
    interval is computed from the intervals of the scores (`_recovered`).
    """
    top, bottom = sum(p.top.value for p in parts), sum(p.bottom.value for p in parts)
    if all(p.resampled for p in parts):
        tail = expanded_tail(0.025, min(p.table.effective for p in parts))
        draws = np.sum([p.top.draws for p in parts], axis=0) / np.sum([p.bottom.draws for p in parts], axis=0)
        low, high = (float(x) for x in np.quantile(draws, (tail, 1 - tail)))
    else:
        low, high = _recovered(parts, top, bottom)
    return Kept(value=top / bottom, low=low, high=high)


def _recovered(parts: Sequence[_Part], top: float, bottom: float) -> tuple[float, float]:
    """Return the interval of top / bottom from the intervals of both: Donner and Zou 2012 (MOVER), with the correlation over clusters.

    Each end x solves (top - x * bottom)^2 = a^2 - 2 x c + x^2 b^2, where a and b are the distances from the scores to those ends of
    their intervals that move the ratio the same way, and c is their product times the correlation.
    """

    def terms(up: bool, shrinks: bool) -> tuple[float, float, float]:
        ends = [
            (
                p.top.high - p.top.value if up else p.top.value - p.top.low,
                p.bottom.value - p.bottom.low if shrinks else p.bottom.high - p.bottom.value,
                p.correlation,
            )
            for p in parts
        ]
        a, b = (sum(e[i] ** 2 for e in ends) for i in (0, 1))
        middle = top * bottom - sum(x * y * correlation for x, y, correlation in ends)
        square, rest = bottom**2 - b, top**2 - a
        return square, middle, math.sqrt(max(middle**2 - square * rest, 0.0))

    square, middle, root = terms(up=True, shrinks=True)
    high = (middle + root) / square
    # If the configuration's interval reaches below 0, the lower end is negative; a smaller parent score then moves it further down.
    down = sum((p.top.value - p.top.low) ** 2 for p in parts)
    if top <= 0 or top**2 <= down:
        square, middle, root = terms(up=False, shrinks=True)
        return (middle - root) / square, high
    square, middle, root = terms(up=False, shrinks=False)
    return (top**2 - down) / (middle + root), high
