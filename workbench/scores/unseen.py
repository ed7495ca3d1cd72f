"""Hold a verdict against clusters that were not drawn.

Sign flips hold where differences are symmetric about 0. If a few clusters gain much and all others lose a little, a sample often contains no
gaining cluster: it then shows no skewness, and no resampling can know of it. The verdict "worse" is therefore held against one more cluster
that moves the other way (`unseen_p`). How far it moves is what the rows of the family say about their metric: the clusters' means and the
items' scores that moved that way, in all rows that are not shown to differ. It is (M / m)^2 of their moments M = sum |x|^2.5 and m = sum x^2,
the maximum for rare gains and about 1.5 standard deviations for a bell, whose two sides' mean is the least that m can be.

A row that is alone has no others to ask. If no item moved the other way, what rests is an assumption: an unseen item moves by half of the
metric's declared range, divided by the number of rows of that metric. No rule can do without one: a share q of gaining items is absent from n
items with probability (1 - q)^n, and the sample is then that of items that all lost a little. `Standing.withstands` says up to which change of
an unseen item a verdict holds.

Right and wrong items that are clusters of their own move by 1 alone; a mean of 0 makes them symmetric, and the flips are enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.scores.changes import Changes, likeness
from workbench.scores.signflips import TINY, Floats, skew_p, times_needed, unseen_p

_LEFT = 4 / 5  # of the p of `skew_p`, and of `unseen_p` unless items are right or wrong
_SPREADS = 2  # standard deviations of the sums, which the unseen sum need not exceed: they are in the sample
_TINIEST = 1e-6  # of the largest sum: an unseen sum of this size is none
_LEAST = 1e-4  # of the level of a single row, below which random patterns of signs say nothing


@dataclass(frozen=True)
class Standing:
    """A row in its family: its p, and what clusters that were not drawn leave of it.

    Attributes:
        changes: The row.
        tested: Its p by the family's sign flips.
        size: Sum of an unseen cluster against the row's direction; 0 if none is held against it.
        by_unseen: Factor of the unseen cluster's p; 0 if nothing is held against the row.
        by_skew: Factor of the p that is corrected for skewness.
    """

    changes: Changes
    tested: float
    size: float
    by_unseen: float
    by_skew: float

    @property
    def _side(self) -> int:
        """The row's direction."""
        return 1 if self.changes.mean >= 0 else -1

    @cached_property
    def p(self) -> float:
        """Two-sided p of "no difference": that of the sign flips, or what unseen clusters and skewness leave of it."""
        return max(self.tested, self._left(self.changes.sums)) if self.by_unseen and self.changes.moved else self.tested

    def _left(self, sums: Floats, times: float = 1.0) -> float:
        """Return the p that unseen clusters and skewness leave of some sums, if each cluster counts `times`."""
        return max(self.by_skew * skew_p(sums, self.changes.sizes, times), self._reversed(sums, self.size, times))

    def _reversed(self, sums: Floats, size: float, times: float = 1.0) -> float:
        return self.by_unseen * unseen_p(self._side * sums, size, times) if size > 0 else 0.0

    def enough(self, level: float) -> float | None:
        """Return how many times as many clusters of the same kind would bring `p` to a level, if the flips do; None if none would."""
        return times_needed(lambda times: self._left(self.changes.sums, times), level)

    def withstands(self, level: float) -> float | None:
        """Return the change of an unseen item, in the units of the sums, up to which `p` stays within a level; None if it does not matter.

        The item's cluster moves as its items do that are alike.
        """
        if not self.size > 0 or self.p > level:
            return None
        low, high = self.size, 8 * self.size
        while self._reversed(self.changes.sums, high) <= level:
            low, high = high, 8 * high
        while high > 1.02 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._reversed(self.changes.sums, middle) <= level else (low, middle)
        return math.hypot(low, _SPREADS * _deviation(self.changes)) / _alike(self.changes)

    def needed(self, t: float, level: float) -> float:
        """Return the mean at which `p` reaches a level, in units of the mean at which a test with this critical value rejects; at least 1.

        The spread of the clusters stays as it is.
        """
        changes = self.changes
        effective = changes.effective
        if not self.by_unseen or effective <= 1 + 1e-9:
            return 1.0
        error = _deviation(changes) * math.sqrt(changes.sums.size * effective / (effective - 1)) / float(changes.sizes.sum())
        if not TINY < t * error < math.inf:
            return 1.0

        def passes(times: float) -> bool:
            mean = self._side * times * t * error
            return self._left(changes.sums + (mean - changes.mean) * changes.sizes) <= level

        low, high = 1.0, 2.0
        if passes(low):
            return low
        while high < 1e3 and not passes(high):
            low, high = high, 2 * high
        while high > 1.02 * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if passes(middle) else (middle, high)
        return high


def alone(changes: Changes) -> Standing:
    """Return the standing of a row that is tested alone."""
    return standings([changes], [changes.flipped], [1.0], ["alone"], 1.0)[0]


def standings(
    rows: Sequence[Changes], tested: Sequence[float], single: Sequence[float], metrics: Sequence[Hashable], alpha: float
) -> list[Standing]:
    """Return the standings of a family's rows.

    The most significant row comes first, and a row that is shown to differ leaves the others': that one configuration is broken says
    nothing about how far the items of the others move.

    Args:
        rows: The rows [r].
        tested: Their p by the family's sign flips.
        single: For each row the level of a test of it alone at the critical value of the family's first step. Their mean says how many
            independent rows the family counts for.
        metrics: The metric of each row; the swings of rows with the same metric have the same units.
        alpha: Error rate of the family.
    """
    if not rows:
        return []
    swings = {side: np.array([_swings(row, side) for row in rows]) for side in (1, -1)}
    kept = {metric: np.array([m == metric for m in metrics]) for metric in set(metrics)}
    often, found = Counter(metrics), {}
    counted = min(max(alpha / max(float(np.mean(single)), _LEAST), 1.0), len(rows))
    for i in sorted(range(len(rows)), key=lambda i: (tested[i], -abs(float(rows[i].sums.sum())) / max(rows[i].scale, TINY))):
        row, metric = rows[i], metrics[i]
        if row.items.answers and row.items.each == 1:
            standing = Standing(row, tested[i], 0.0, 0.0, 0.0)
        else:
            against = swings[-1 if row.mean >= 0 else 1][kept[metric]].sum(0)
            by_unseen = counted if row.items.answers else _LEFT * counted
            by_skew = _LEFT * max(counted / often[metric], 1.0)
            standing = Standing(row, tested[i], _unseen(row, against, often[metric]), by_unseen, by_skew)
        found[i] = standing
        if tested[i] <= alpha and standing.p <= alpha:
            kept[metric][i] = False
    return [found[i] for i in range(len(rows))]


def _swings(row: Changes, side: int) -> tuple[float, ...]:
    """Return a row's moments to a side: |x|^2.5, x^2, and half of x^2 to both sides, of the clusters' means and of the items."""
    some = row.sizes > 0
    rates = side * row.sums[some] / row.sizes[some] / likeness(row.items.each)
    shares = row.sizes[some] / row.sizes.mean()
    squares, risen = shares * rates**2, rates > 0
    up, down = (row.items.rises, row.items.falls)[::side]
    over = float(squares[risen] @ np.sqrt(rates[risen]))
    return over, float(squares[risen].sum()), float(squares.sum()) / 2, up[0], up[1], (up[1] + down[1]) / 2


def _unseen(row: Changes, against: Floats, rows: int) -> float:
    """Return the size of the sum of an unseen cluster.

    Args:
        row: The row.
        against: Moments of the swings of all rows of its metric to the other side.
        rows: Number of these rows.
    """
    high, low, both, item_high, item_low, item_both = (float(x) for x in against)
    item = (item_high / max(item_low, item_both, TINY**2)) ** 2
    x = row.items.assumed if row.items.answers else max(row.items.assumed / rows, item)
    least = both / 2 if row.items.answers else both
    size = _alike(row) * ((high + x**2.5) / max(max(low, least) + x * x, TINY**2)) ** 2
    none = max(1e-3 * size, _TINIEST * float(np.abs(row.sums).max()))
    return math.sqrt(max(size**2 - (_SPREADS * _deviation(row)) ** 2, none**2))


def _alike(row: Changes) -> float:
    """Return how much the sum of a cluster of mean size moves if one of its items moves by 1 and the others as items that are alike."""
    return float(row.sizes.mean()) * likeness(row.items.each)


def _deviation(row: Changes) -> float:
    """Return the standard deviation of the clusters' sums about the mean."""
    rest = row.sums - row.mean * row.sizes
    return math.sqrt(float(rest @ rest) / row.sums.size)
