"""Sign flips: how large a mean difference becomes where no difference is expected.

Where two configurations are equally good, the sum of differences of every cluster is as often positive as negative. Flipping the signs of
clusters therefore gives the distribution of the mean under "no difference", whatever the clusters' sizes (Pitman 1937). Configurations
that are scored on the same items are flipped together, so that a family of many similar ones costs little: the largest statistic of
their rows under each pattern of signs is what a single one has to exceed (step-down max-T, Westfall and Young 1993).

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
class StepDown:
    """What a family leaves to one row.

    Attributes:
        p: Adjusted mid-p.
        critical: What the row's statistic has to reach at the step at which it was tested.
        least: The p that the row would have if all its clusters had changed in one direction; above the level no verdict can fall.
    """

    p: float
    critical: float
    least: float


def step_down(tasks: Sequence[tuple[Floats, Floats]], alpha: float) -> list[list[StepDown]]:
    """Test all rows of a family, step by step, the most significant first.

    Rows of one task are flipped together and held against the largest statistic of those that are left (max-T). Tasks are independent, and
    the smallest of their p values is held against their number (Sidak), since statistics over clusters of other shapes are not alike. The
    probability of any false rejection is at most `alpha`, whichever rows are truly zero.

    Args:
        tasks: For each task the sums [clusters, rows] and the rows' scales [rows]; a row's statistic is |sum| / scale.
        alpha: Error rate of the family.

    Returns:
        A step for each row, as `tasks` has them. Rows that are not rejected have the critical value of the first step, which holds for
        all rows at once.
    """
    found = [[StepDown(1.0, math.inf, 1.0)] * len(scales) for _, scales in tasks]
    ladders = [_Ladder(sums, scales) for sums, scales in tasks if len(scales)]
    places = [t for t, (_, scales) in enumerate(tasks) if len(scales)]
    first = [ladder.critical(_one_of(alpha, len(ladders))) for ladder in ladders]
    running = 0.0
    while left := [i for i, ladder in enumerate(ladders) if ladder.left]:
        i = min(left, key=lambda i: ladders[i].p)
        ladder, count = ladders[i], len(left)
        running = max(running, _any_of(ladder.p, count))
        critical = ladder.critical(_one_of(alpha, count)) if running <= alpha else first[i]
        found[places[i]][ladder.row] = StepDown(running, critical, _any_of(ladder.least, count))
        ladder.pop()
    return found


def _any_of(p: float, tasks: int) -> float:
    """Probability that any of some independent p values is as small."""
    return float(-math.expm1(tasks * math.log1p(-p))) if p < 1 else 1.0


def _one_of(alpha: float, tasks: int) -> float:
    """The level of each of some independent p values that keeps the probability of any at alpha."""
    return float(-math.expm1(math.log1p(-alpha) / tasks)) if alpha < 1 else 1.0


class _Ladder:
    """A task's rows by their statistic, and the largest statistic of those that are left."""

    def __init__(self, sums: Floats, scales: Floats) -> None:
        self._seen = np.abs(sums.sum(0)) / scales
        self._most = np.abs(sums).sum(0) / scales
        self._order = [int(r) for r in np.argsort(self._seen, kind="stable")]
        drawn = (np.abs(flipped(sums)) / scales).astype(np.float32)
        self._largest = np.maximum.accumulate(drawn[:, self._order], axis=1)  # [patterns, rows], row by row from the smallest
        self._p: float | None = None

    @property
    def left(self) -> int:
        """How many rows are left."""
        return len(self._order)

    @property
    def row(self) -> int:
        """The row with the largest statistic of those that are left."""
        return self._order[-1]

    @property
    def p(self) -> float:
        """Mid-p of that row: the largest statistic exceeds its own, or, half of it, equals it."""
        if self._p is None:
            self._p = self._above(float(self._seen[self.row]))
        return self._p

    @property
    def least(self) -> float:
        """The p of that row if all its clusters had changed in one direction."""
        return self._above(float(self._most[self.row]))

    def pop(self) -> None:
        """Take that row out."""
        self._order.pop()
        self._p = None

    def critical(self, alpha: float) -> float:
        """Return the least value that the largest statistic takes and that leaves at most `alpha` above it; infinite if none does.

        Between two values that it takes nothing is known of a statistic's distribution, so that the upper one is the answer.
        """
        values, counts = np.unique(self._largest[:, self.left - 1], return_counts=True)
        above = np.cumsum(counts[::-1])[::-1] - counts / 2
        at = int(np.searchsorted(-above / counts.sum(), -alpha, "left"))
        return float(values[at]) if at < len(values) else math.inf

    def _above(self, z: float) -> float:
        found, close = self._largest[:, self.left - 1], _CLOSE * (1 + z)
        return float(((found > z + close).mean() + (found >= z - close).mean()) / 2)


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
