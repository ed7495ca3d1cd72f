"""Sign flips: how large a mean difference becomes where no difference is expected.

Where two configurations are equally good, the sum of differences of every cluster is as often positive as negative. Flipping the signs of
clusters therefore gives the distribution of the mean under "no difference", whatever the clusters' sizes (Pitman 1937). Configurations
that are scored on the same items are flipped together, so that a family of many similar ones costs little: the largest statistic of
the family under each pattern of signs is what a single one has to exceed (step-down max-T, Westfall and Young 1993).

Scores are discrete, so p values are mid-p: a pattern that gives exactly the observed value counts half (Lancaster 1961).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Signs = NDArray[np.int8]

TINY = 1e-12
PATTERNS = 10_000
"""Random patterns of signs where there are too many to take all."""
_ALL_UP_TO = 14  # clusters: all 2^13 patterns, the first sign fixed
_KEPT_UP_TO = 2048  # clusters whose patterns are kept, a byte a sign
_CHUNK = 1 << 24  # signs at once
_CLOSE = 1e-5  # of the sum of absolute values: equal in single precision


def flipped(sums: Floats) -> Singles:
    """Return sums over clusters under patterns of signs.

    The first pattern flips nothing. Up to 14 clusters all patterns are taken, the sign of the first cluster fixed, since tests use
    absolute values alone; above, 10,000 seeded ones, the same for every task with this number of clusters.

    Args:
        sums: [clusters, rows].

    Returns:
        [patterns, rows].
    """
    table = np.asarray(sums, np.float32)
    return np.concatenate([signs.astype(np.float32) @ table for signs in _patterns(len(table))])


def tails(sums: Floats) -> Floats:
    """Two-sided mid-p [rows] of "the differences are symmetric about 0", from their sums by cluster [clusters, rows]."""
    total = np.abs(sums).sum(0)
    found, seen, close = np.abs(flipped(sums)), np.abs(sums.sum(0)), _CLOSE * total
    p = ((found > seen + close).mean(0) + (found >= seen - close).mean(0)) / 2
    return np.where(np.abs(sums).max(0) > TINY, p, 1.0)  # 1: items changed, but no cluster's sum did


@dataclass(frozen=True)
class Step:
    """What a family leaves to one row.

    Attributes:
        p: Adjusted mid-p.
        critical: What the row's statistic has to reach at the step at which it was tested.
        least: The p that the row would have if all its clusters had changed in one direction; above the level no verdict can fall.
    """

    p: float
    critical: float
    least: float


def step_down(tasks: Sequence[tuple[Floats, Floats]], alpha: float) -> list[list[Step]]:
    """Test all rows of a family with step-down max-T.

    Rows of one task are flipped together; tasks are independent of each other, so that the distribution of the largest statistic is the
    product over tasks. The probability of any false rejection is at most `alpha`, whichever rows are truly zero.

    Args:
        tasks: For each task the sums [clusters, rows] and the rows' scales [rows]; a row's statistic is |sum| / scale.
        alpha: Error rate of the family.

    Returns:
        A step for each row, as `tasks` has them. Rows that are not rejected have the critical value of the first step, which holds for
        all rows at once.
    """
    seen = [np.abs(sums.sum(0)) / scales for sums, scales in tasks]
    most = [np.abs(sums).sum(0) / scales for sums, scales in tasks]
    drawn: list[Singles] = [(np.abs(flipped(sums)) / scales).astype(np.float32) for sums, scales in tasks]
    # From the smallest statistic: the set of each step is the last one's and one row more.
    order = sorted((float(z), t, r) for t, row in enumerate(seen) for r, z in enumerate(row))
    largest = _Largest(drawn)
    p, least = [], []
    for z, t, r in order:
        largest.add(t, r)
        p.append(largest.above(z))
        least.append(largest.above(float(most[t][r])))
    first = largest.quantile(alpha) if order else 0.0
    adjusted = np.maximum.accumulate(p[::-1])[::-1]
    found = [[Step(1.0, first, 1.0)] * len(row) for row in seen]
    largest = _Largest(drawn)
    for i, (_, t, r) in enumerate(order):
        largest.add(t, r)
        critical = largest.quantile(alpha) if adjusted[i] <= alpha else first
        found[t][r] = Step(float(adjusted[i]), critical, least[i])
    return found


class _Largest:
    """The largest statistic of a growing set of rows, by task."""

    def __init__(self, drawn: Sequence[Singles]) -> None:
        self._drawn = drawn
        self._by_task = [np.zeros(len(z), np.float32) for z in drawn]
        self._sorted: list[Singles | None] = list(self._by_task)

    def add(self, task: int, row: int) -> None:
        """Put a row into the set."""
        np.maximum(self._by_task[task], self._drawn[task][:, row], out=self._by_task[task])
        self._sorted[task] = None

    def _found(self) -> list[Singles]:
        """The largest statistics of each task, sorted."""
        self._sorted = [np.sort(z) if kept is None else kept for z, kept in zip(self._by_task, self._sorted, strict=True)]
        return [z for z in self._sorted if z is not None]

    def above(self, z: float) -> float:
        """Mid-p: the probability that the largest statistic exceeds z, half of that it equals z included."""
        upto, below = 1.0, 1.0
        for found in self._found():
            close = _CLOSE * (1 + z)
            upto *= np.searchsorted(found, z + close, "right") / found.size
            below *= np.searchsorted(found, z - close, "left") / found.size
        return float(1 - (upto + below) / 2)

    def quantile(self, alpha: float) -> float:
        """Return the least value that the largest statistic takes and that leaves at most `alpha` above it; infinite if none does.

        Between two values that it takes nothing is known of a statistic's distribution, so that the upper one is the answer.
        """
        found = self._found()
        low, high = 0.0, max(float(z[-1]) for z in found)
        if self.above(high) > alpha:
            return math.inf
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.above(middle) > alpha else (low, middle)
        at = [np.searchsorted(z, high - _CLOSE * (1 + high), "left") for z in found]
        return min(float(z[i]) for z, i in zip(found, at, strict=True) if i < z.size)


def _patterns(clusters: int) -> Iterator[Signs]:
    """Patterns of signs [some, clusters], chunk by chunk."""
    if clusters > _KEPT_UP_TO:
        yield from _drawn(clusters)
    else:
        kept, rows = _kept(clusters), max(1, _CHUNK // clusters)
        yield from (kept[start : start + rows] for start in range(0, len(kept), rows))


@lru_cache(maxsize=8)
def _kept(clusters: int) -> Signs:
    if clusters > _ALL_UP_TO:
        return np.concatenate(list(_drawn(clusters)))
    bits = np.arange(1 << max(clusters - 1, 0))[:, None] >> np.arange(clusters)[None, ::-1] & 1
    return (1 - 2 * bits).astype(np.int8)


def _drawn(clusters: int) -> Iterator[Signs]:
    rng, rows = np.random.default_rng(clusters), max(1, _CHUNK // clusters)
    for start in range(0, PATTERNS, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, PATTERNS - start), clusters), np.int8)
        if start == 0:
            signs[0] = 1
        yield signs
