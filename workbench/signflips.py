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
_Singles = NDArray[np.float32]

TINY = 1e-12
PATTERNS = 10_000
"""Random patterns of signs where there are too many to take all."""
_ALL_UP_TO = 14  # clusters: all 2^13 patterns, the first sign fixed
_CACHED = 512  # clusters whose patterns are kept
_CHUNK = 1 << 24  # signs drawn at once
_CLOSE = 1e-5  # of the sum of absolute values: equal in single precision


def flipped(sums: Floats) -> Floats:
    """Return sums over clusters under patterns of signs.

    The first pattern flips nothing. Up to 14 clusters all patterns are taken, the sign of the first cluster fixed, since tests use
    absolute values alone; above, 10,000 seeded ones, the same for every task with this number of clusters.

    Args:
        sums: [clusters] or [clusters, rows].

    Returns:
        [patterns] or [patterns, rows].
    """
    table = np.asarray(sums, np.float32)
    return np.concatenate([signs @ table for signs in _patterns(len(table))]).astype(np.float64)


def tails(sums: Floats) -> float:
    """Two-sided mid-p of "the differences are symmetric about 0", from their sums by cluster [clusters]."""
    if not np.abs(sums).max() > TINY:  # items changed, but no cluster's sum did
        return 1.0
    found, seen, close = np.abs(flipped(sums)), abs(float(sums.sum())), _CLOSE * float(np.abs(sums).sum())
    return float(((found > seen + close).mean() + (found >= seen - close).mean()) / 2)


@dataclass(frozen=True)
class Step:
    """What a family leaves to one row.

    Attributes:
        p: Adjusted mid-p.
        critical: What the row's statistic has to exceed at the step at which it was tested.
        least: The p that the row would have if all its clusters had changed in one direction; above the level no verdict can fall.
    """

    p: float
    critical: float
    least: float


def step_down(tasks: Sequence[tuple[Floats, Floats]], alpha: float) -> tuple[list[list[Step]], float]:
    """Test all rows of a family with step-down max-T.

    Rows of one task are flipped together; tasks are independent of each other, so that the distribution of the largest statistic is the
    product over tasks. The probability of any false rejection is at most `alpha`, whichever rows are truly zero.

    Args:
        tasks: For each task the sums [clusters, rows] and the rows' scales [rows]; a row's statistic is |sum| / scale.
        alpha: Error rate of the family.

    Returns:
        A step for each row, as `tasks` has them, and the critical value of the first step: it holds for all rows at once.
    """
    seen = [np.abs(sums.sum(0)) / scales for sums, scales in tasks]
    most = [np.abs(sums).sum(0) / scales for sums, scales in tasks]
    drawn = [np.abs(flipped(sums)) / scales for sums, scales in tasks]
    largest = _Largest([len(z) for z in drawn])
    order = sorted(((float(z), t, r) for t, row in enumerate(seen) for r, z in enumerate(row)))
    steps: list[tuple[int, int, Step]] = []
    for z, t, r in order:  # from the smallest statistic: each step's set is the last one's and one row more
        largest.add(t, drawn[t][:, r])
        steps.append((t, r, Step(largest.above(z), largest.quantile(alpha), largest.above(float(most[t][r])))))
    first = steps[-1][2].critical if steps else 0.0
    found = [[Step(1.0, math.inf, 1.0)] * len(row) for row in seen]
    running, stopped = 0.0, None
    for t, r, step in reversed(steps):
        running = max(running, step.p)
        if stopped is None and running > alpha:
            stopped = step.critical
        found[t][r] = Step(running, step.critical if stopped is None else stopped, step.least)
    return found, first


class _Largest:
    """The largest statistic of a growing set of rows, by task."""

    def __init__(self, patterns: Sequence[int]) -> None:
        self._by_task = [np.zeros(n) for n in patterns]
        self._sorted = list(self._by_task)

    def add(self, task: int, statistics: Floats) -> None:
        """Put a row into the set."""
        self._by_task[task] = np.maximum(self._by_task[task], statistics)
        self._sorted[task] = np.sort(self._by_task[task])

    def above(self, z: float) -> float:
        """Mid-p: the probability that the largest statistic exceeds z, half of that it equals z included."""
        upto, below = 1.0, 1.0
        for found in self._sorted:
            close = _CLOSE * (1 + z)
            upto *= np.searchsorted(found, z + close, "right") / found.size
            below *= np.searchsorted(found, z - close, "left") / found.size
        return float(1 - (upto + below) / 2)

    def quantile(self, alpha: float) -> float:
        """The least value that leaves at most `alpha` above it."""
        low, high = 0.0, max(float(found[-1]) for found in self._sorted)
        if self.above(high) > alpha:
            return math.inf
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.above(middle) > alpha else (low, middle)
        return high


def _patterns(clusters: int) -> Iterator[_Singles]:
    """Patterns of signs [some, clusters], chunk by chunk."""
    if clusters <= _CACHED:
        yield _kept(clusters)
    else:
        yield from _drawn(clusters)


@lru_cache(maxsize=16)
def _kept(clusters: int) -> _Singles:
    if clusters > _ALL_UP_TO:
        return np.concatenate(list(_drawn(clusters)))
    bits = np.arange(1 << max(clusters - 1, 0))[:, None] >> np.arange(clusters)[None, ::-1] & 1
    return (1 - 2 * bits).astype(np.float32)


def _drawn(clusters: int) -> Iterator[_Singles]:
    rng, rows = np.random.default_rng(clusters), max(1, _CHUNK // clusters)
    for start in range(0, PATTERNS, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, PATTERNS - start), clusters), np.int8)
        if start == 0:
            signs[0] = 1
        yield signs.astype(np.float32)
