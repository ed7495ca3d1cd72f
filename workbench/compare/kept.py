"""What a configuration kept of its parents' skills: the ratio of chance-corrected scores, where that ratio says something.

The ratio of two scores has a finite confidence interval only where the lower one is clearly above 0: Fieller's interval (1954) is
unbounded as soon as g = (t * error / score)^2 of the denominator reaches 1, and far too wide before. Finney (Probit Analysis, 1971)
seldom met a usable ratio with g above 0.4. Here the parent's 95 % interval may reach down to half of its corrected score, g = 1/4; else the
ratio is withheld, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.compare.tables import Table
from workbench.scores.signflips import TINY
from workbench.scores.statistics import MANY_CLUSTERS, Floats, expanded_tail
from workbench.scores.store import Configuration

_LEAST = 0.5  # of its distance from chance that the parent's lower bound must keep


@dataclass(frozen=True)
class _Side:
    """A chance-corrected score with its 95 % interval, and the same score under resampled clusters."""

    value: float
    low: float
    high: float
    draws: Floats


@dataclass(frozen=True)
class _Part:
    """A configuration and its best parent on one task; `together`: correlation of the two between clusters."""

    table: Table
    top: _Side
    bottom: _Side
    together: float

    @property
    def resampled(self) -> bool:
        """Whether resampling shows the spread of both scores: enough clusters, and scores that are not all alike."""
        spread = min(float(np.ptp(side.draws)) for side in (self.top, self.bottom))
        return self.table.clusters >= MANY_CLUSTERS and spread > TINY


def kept_of(tasks: Sequence[Table], c: Configuration, parents: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the corrected score over the best parent's, by task, and the ratio of the sums over the tasks that have one.

    A task counts if it is a skill that one of the bricks behind `c` owns, or, where no owner is declared, any skill. The best parent is
    chosen once, on all items. Where it is too near to chance for a ratio, or chance is not known, the value is None and `reason` says why.

    Args:
        tasks: On which the configuration was scored.
        c: The configuration.
        parents: Name -> digest of its parents that were scored too.
    """
    kept: dict[str, Any] = {}
    parts = []
    for t in tasks:
        owner = t.suite.owners.get(t.name)
        scored = {name: digest for name, digest in parents.items() if digest in t.values}
        if not t.skill or not scored or (owner is not None and owner not in c.parents):
            continue
        best = max(scored, key=lambda name: float(t.values[scored[name]].mean()))
        if reason := _too_near(t, best, scored[best]):
            kept[t.name] = _withheld(reason)
            continue
        part = _part(t, c.digest, scored[best])
        kept[t.name] = _ratio([part])
        parts.append(part)
    if parts:
        return kept, _ratio(parts)
    reasons = {name: found["reason"] for name, found in kept.items()}
    return kept, _withheld("; ".join(f"{name}: {reason}" for name, reason in reasons.items())) if reasons else None


def _withheld(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "reason": reason}


def _too_near(t: Table, name: str, digest: str) -> str | None:
    """Return why the parent's score is no denominator; None where it is one."""
    if t.chance is None:
        return f"chance on {t.name} is not known"
    side = _side(t, digest)
    if side.low >= _LEAST * side.value > 0 and side.draws.min() > 0:
        return None
    low, high = t.interval(digest)
    return f"parent {name} is at {t.value(digest):.0%} [{100 * low:.0f}, {100 * high:.0f}], chance is {t.chance:.0%}".replace(
        "%", " %"
    )


def _side(t: Table, digest: str) -> _Side:
    low, high = t.interval(digest)
    return _Side(float(t.corrected(t.value(digest))), float(t.corrected(low)), float(t.corrected(high)), t.resampled[digest])


def _part(t: Table, digest: str, parent: str) -> _Part:
    sums = [np.bincount(t.cluster, t.values[d] - t.values[d].mean()) for d in (digest, parent)]
    scale = math.sqrt(float((sums[0] ** 2).sum() * (sums[1] ** 2).sum()))
    return _Part(t, _side(t, digest), _side(t, parent), float(sums[0] @ sums[1]) / scale if scale > TINY else 0.0)


def _ratio(parts: Sequence[_Part]) -> dict[str, Any]:
    """Sum of the configuration's scores over the sum of its parents', with a 95 % interval.

    Clusters are resampled, the same draws for both; the percentiles are moved outwards to the t quantile of the task with the fewest
    effective clusters (Hesterberg 2015, expanded percentile). Below 20 clusters, or where all scores of one side are alike, the interval
    is made of the single ones (`_recovered`).
    """
    top, bottom = sum(p.top.value for p in parts), sum(p.bottom.value for p in parts)
    if all(p.resampled for p in parts):
        tail = expanded_tail(0.025, min(p.table.effective for p in parts))
        draws = np.sum([p.top.draws for p in parts], axis=0) / np.sum([p.bottom.draws for p in parts], axis=0)
        low, high = (float(x) for x in np.quantile(draws, (tail, 1 - tail)))
    else:
        low, high = _recovered(parts, top, bottom)
    return {"value": top / bottom, "low": low, "high": high}


def _recovered(parts: Sequence[_Part], top: float, bottom: float) -> tuple[float, float]:
    """Interval of top / bottom recovered from the intervals of both: Donner and Zou 2012 (MOVER), with the correlation between clusters.

    Each end x solves (top - x * bottom)^2 = a^2 - 2 x c + x^2 b^2, where a and b are the distances from the scores to those ends of
    their intervals that move the ratio the same way, and c is their product times the correlation.
    """

    def terms(up: bool, shrinks: bool) -> tuple[float, float, float]:
        ends = [
            (
                p.top.high - p.top.value if up else p.top.value - p.top.low,
                p.bottom.value - p.bottom.low if shrinks else p.bottom.high - p.bottom.value,
                p.together,
            )
            for p in parts
        ]
        a, b = (sum(e[i] ** 2 for e in ends) for i in (0, 1))
        middle = top * bottom - sum(x * y * together for x, y, together in ends)
        square, rest = bottom**2 - b, top**2 - a
        return square, middle, math.sqrt(max(middle**2 - square * rest, 0.0))

    square, middle, root = terms(up=True, shrinks=True)
    high = (middle + root) / square
    # The lower end is negative where the configuration's interval reaches below 0; a smaller parent then moves it further down.
    down = sum((p.top.value - p.top.low) ** 2 for p in parts)
    if top <= 0 or top**2 <= down:
        square, middle, root = terms(up=False, shrinks=True)
        return (middle - root) / square, high
    square, middle, root = terms(up=False, shrinks=False)
    return (top**2 - down) / (middle + root), high
