"""Mean differences over clusters of items: their sign-flip test and their interval.

For scores without a range, the interval inverts the flipped statistic, (S - N x)^2 / sum over clusters (s - n x)^2, at the quantile of
Student's t with the effective number of clusters minus 1 degrees of freedom; for clusters of equal size this is the cluster-robust t
interval. For scores with a range, it inverts a score statistic at the same t,

    z(x)^2 = (S - N x)^2 / V(x),    V(x) = D R(x) sum over items (d - x)^2,

for items with differences d in clusters of n items with sums s; S and N are the totals. D is the design effect: the clustered variance divided
by the variance of independent items, at least 1 for right/wrong items. R is Tango's (1998) ratio of the smallest variance that items of this
range can have at mean x to the observed variance: without it, two losses and no win in 240 items would exclude a true loss of 2 points.

What skewness and unseen clusters leave of the test is in `unseen`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.scores.signflips import TINY, skew_p, t_tail, tails, times_needed, unseen_p
from workbench.scores.statistics import Floats, effective_clusters, upper_t

_ALIKE = 0.1  # correlation of changes within a cluster that was not seen
_CLOSE = 1e-15  # relative width of a search for the end of an interval


@dataclass(frozen=True)
class Bounded:
    """Sums over differences d of items whose scores have a range, each with a weight w that is 1 except for pooled tasks.

    Attributes:
        span: Largest possible change of an item.
        rise: Sum of the positive differences.
        fall: Sum of the negative differences, as a positive number.
        squares: Sum of w^2 d^2.
        plain: Sum of w^2 d.
        units: Sum of w^2.
        spread: Sum of w^2 (d - mean)^2, the variance of the sum for independent items.
        variance: Clustered variance of the sum.
        answers: True if items are right or wrong.
    """

    span: float
    rise: float
    fall: float
    squares: float
    plain: float
    units: float
    spread: float
    variance: float
    answers: bool

    def scaled(self, weight: float, factor: float) -> Bounded:
        """Return these differences multiplied by `factor`, with each item weighted by `weight`."""
        scale = weight * factor
        return Bounded(
            span=self.span * factor,
            rise=scale * self.rise,
            fall=scale * self.fall,
            squares=scale**2 * self.squares,
            plain=scale * weight * self.plain,
            units=weight**2 * self.units,
            spread=scale**2 * self.spread,
            variance=scale**2 * self.variance,
            answers=self.answers,
        )

    @cached_property
    def _design(self) -> float:
        """The design effect D; 1 if all items change by the same amount, so that it cannot be estimated."""
        effect = self.variance / self.spread if self.spread > TINY else 1.0
        return max(effect, 1.0) if self.answers else effect

    def variance_at(self, x: float, items: float) -> float:
        """Return V(x), the variance of the sum of `items` differences whose true mean is x."""
        observed = max(self.squares - 2 * x * self.plain + x * x * self.units, 0.0)
        return self._design * observed * self._widened(x / self.span, items)

    def _widened(self, x: float, n: float) -> float:
        """Return R(x): Tango's variance of items that rise, fall or stay, divided by the variance at the observed shares.

        Items that change by less than the whole range count as fractions of such items. With shares q + x of rises and q of falls, the
        likelihood is largest at the root q of 2 n q^2 - (rise + fall + x (rise - fall) - 2 n x) q - fall x (1 - x) = 0.
        """
        rise, fall = self.rise / self.span, self.fall / self.span
        observed = rise + fall - 2 * x * (rise - fall) + n * x * x
        if observed <= TINY * n:
            return 1.0
        b, c = 2 * n * x - (rise + fall) - x * (rise - fall), -fall * x * (1 - x)
        q = max((math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n), 0.0, -x)
        return max(n * (2 * q + x - x * x), 0.0) / observed


@dataclass(frozen=True)
class Items:
    """How far single items moved, in the units of a cluster's sum divided by its size.

    Attributes:
        each: Items per cluster.
        rises: Sums of w |d|^2.5 and of w d^2 over the items that rose, of weight w, by d.
        falls: The same over the items that fell.
        assumed: Change of an item that is reckoned with even if none was seen: half of the metric's declared range, or what the suite's
            `worst` makes of it, or 1 for right/wrong items; 0 if nothing is declared.
        answers: True if items are right or wrong.
    """

    each: float
    rises: tuple[float, float]
    falls: tuple[float, float]
    assumed: float = 0.0
    answers: bool = False

    @classmethod
    def of(cls, each: float, d: Floats, weights: Floats, assumed: float = 0.0, answers: bool = False) -> Items:
        """Return the moments of items with these changes `d` [n] and weights [n]."""
        squares, sizes = weights * d**2, np.abs(d)
        rises, falls = ((float(squares[moved] @ np.sqrt(sizes[moved])), float(squares[moved].sum())) for moved in (d > 0, d < 0))
        return cls(each, rises, falls, assumed, answers)

    def scaled(self, weight: float, factor: float) -> Items:
        """Return these items with changes multiplied by `factor` and weights by `weight`."""
        by = weight * factor**2.5, weight * factor**2
        rises, falls = ((by[0] * side[0], by[1] * side[1]) for side in (self.rises, self.falls))
        return Items(self.each, rises, falls, factor * self.assumed, self.answers)


@dataclass(frozen=True)
class Changes:
    """Data for the test and the interval of a mean difference.

    Attributes:
        sums: Sums of differences by cluster [k].
        sizes: Sums of weights by cluster [k].
        items: How far the items moved.
        bounded: Sums over items, if scores have a range.
        worst: Largest change of a cluster's mean; None if it is not known.
        tested: The p of the sign-flip test, if it was computed together with other rows.
    """

    sums: Floats
    sizes: Floats
    items: Items
    bounded: Bounded | None = None
    worst: float | None = None
    tested: float | None = None

    @cached_property
    def effective(self) -> float:
        """Effective number of clusters."""
        return effective_clusters(self.sizes)

    @cached_property
    def _totals(self) -> tuple[float, float]:
        """The totals S and N."""
        return float(self.sums.sum()), float(self.sizes.sum())

    @property
    def mean(self) -> float:
        """The mean difference."""
        total, weight = self._totals
        return total / weight

    @cached_property
    def moved(self) -> int:
        """Number of clusters whose sum differs from 0."""
        return int((np.abs(self.sums) > TINY).sum())

    @cached_property
    def scale(self) -> float:
        """Divisor that makes the sums of a family's rows comparable; flips of signs do not change it."""
        least = self.bounded.squares if self.bounded and self.bounded.answers else 0.0
        return math.sqrt(max(float(self.sums @ self.sums), least))

    @cached_property
    def flipped(self) -> float:
        """Two-sided p of "no difference" by the sign-flip test alone."""
        return float(tails(self.sums[:, None])[0]) if self.tested is None else self.tested

    def level(self, critical: float) -> float:
        """Return the one-sided level of a test at a critical value."""
        return t_tail(self.as_t(critical), max(self.effective - 1, 1.0))

    def excludes(self, size: float, side: int, level: float, times: float = 1.0) -> bool:
        """Return True if the data exclude a mean change of this size or more, also one that few clusters have and no drawn one shows.

        With a largest change (`worst`) the bound is exact for any number of clusters: k clusters without a change exclude 1 - level^(1/k) of
        it, about 3 / k at 5 %. Without one, skewness is corrected for, and clusters without any change show nothing.

        Args:
            size: Size of the change, in the units of the sums.
            side: 1 for a rise, -1 for a fall.
            level: One-sided level.
            times: Each cluster counts this many times.
        """
        if size >= (math.inf if self.worst is None else self.worst):
            return True
        short = size * self.sizes - side * self.sums  # by how much each cluster falls short of the change
        if self.worst is None:
            return bool(self.moved and short.sum() > 0 and skew_p(short, self.sizes, times) / 2 <= level)
        largest = (self.worst - size) * float(self.sizes @ self.sizes / self.sizes.sum())
        return unseen_p(short, largest, times) <= level

    def excluded_at(self, size: float, side: int, level: float) -> float | None:
        """Return how many times as many clusters of the same kind would exclude this change; None if none would."""
        return times_needed(lambda times: float(not self.excludes(size, side, level, times)), 0.5)

    def critical(self, level: float) -> float:
        """Return the critical value of |S| / scale for a single test at a two-sided level, converted from Student's t."""
        t = upper_t(level / 2, self.effective - 1)
        return t * math.sqrt(self.effective / (self.effective - 1 + t * t))

    def as_t(self, critical: float) -> float:
        """Convert a critical value of the flipped statistic to Student's t."""
        remainder = self.effective - critical**2
        return critical * math.sqrt((self.effective - 1) / remainder) if remainder > TINY else math.inf

    def interval(self, critical: float, rejected: bool) -> tuple[float, float]:
        """Return the interval of all means x whose z(x) is at most the t of a critical value.

        Args:
            critical: Critical value of the flipped statistic.
            rejected: True if the test rejects "no difference".
        """
        return decided(self._end(critical, -1), self._end(critical, 1), self.mean, rejected)

    def _end(self, critical: float, side: int) -> float:
        """Return the lower (side -1) or upper (side 1) end of the interval."""
        t = self.as_t(critical)
        if self.effective <= 1 + 1e-9 or not math.isfinite(t):
            return side * (self.bounded.span if self.bounded else math.inf)
        return self._flipped_end(critical, side) if self.bounded is None else self._bounded_end(self.bounded, t, side)

    def _flipped_end(self, critical: float, side: int) -> float:
        """Return one end for scores without a range: the root of a quadratic, whose leading coefficient is positive if t is finite."""
        (total, weight), square = self._totals, critical**2
        a = weight**2 - square * float(self.sizes @ self.sizes)
        b = square * float(self.sums @ self.sizes) - weight * total
        c = total**2 - square * float(self.sums @ self.sums)
        return (-b + side * math.sqrt(max(b * b - a * c, 0.0))) / a

    def _bounded_end(self, items: Bounded, t: float, side: int) -> float:
        """Return one end for scores with a range: |S - N x| reaches t sqrt(V(x)) between the mean and the largest possible change."""
        total, weight = self._totals

        def excess(x: float) -> float:
            return side * (weight * x - total) - t * math.sqrt(items.variance_at(x, weight))

        return _crossing(excess, self.mean, side * items.span)


def _crossing(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Return where a function becomes positive, to the last bits, by the Illinois form of regula falsi in a fifth of bisection's steps.

    Source:
        Dowell and Jarratt 1971, BIT 11.
    """
    low, high = excess(inside), excess(outside)
    if high <= 0:
        return outside
    least = _CLOSE * abs(outside - inside)
    found, moved = inside, 0
    while abs(outside - inside) > least:
        before, found = found, inside - low * (outside - inside) / (high - low)
        if not min(inside, outside) < found < max(inside, outside):
            found = (inside + outside) / 2
        if abs(found - before) <= least:
            break
        value = excess(found)
        if value <= 0:
            inside, low, high, moved = found, value, high / 2 if moved < 0 else high, -1
        else:
            outside, high, low, moved = found, value, low / 2 if moved > 0 else low, 1
    return found


def decided(low: float, high: float, middle: float, rejected: bool) -> tuple[float, float]:
    """Return an interval that excludes 0 exactly if the test rejected.

    If Student's t and the sign flips disagree, the end nearer to 0 is moved to 0.
    """
    if rejected:
        least = TINY * max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else TINY
        return (max(low, least), high) if middle > 0 else (low, min(high, -least))
    return min(low, 0.0), max(high, 0.0)


def likeness(items: float) -> float:
    """Return how much the mean of a cluster of `items` items moves if each moves by 1, in a direction that others of it may not share."""
    return math.sqrt(_ALIKE + (1 - _ALIKE) / items)


def pooled(parts: Sequence[Changes], scales: Sequence[float] | None = None) -> Changes:
    """Return the changes of a mean over tasks with independent clusters.

    Args:
        parts: Changes by task; all tasks have the same weight, whatever their number of items.
        scales: Factors of the tasks' differences, such as 1 / (1 - chance).
    """
    factors = scales or [1.0] * len(parts)
    items = sum(float(part.sizes.sum()) for part in parts)
    weights = [items / (len(parts) * float(part.sizes.sum())) for part in parts]
    weighted = list(zip(parts, weights, factors, strict=True))
    bounded = [part.bounded.scaled(w, f) for part, w, f in weighted if part.bounded]
    worst = [f * part.worst for part, _, f in weighted if part.worst is not None]
    return Changes(
        sums=np.concatenate([w * f * part.sums for part, w, f in weighted]),
        sizes=np.concatenate([w * part.sizes for part, w, _ in weighted]),
        items=_mixed([part.items.scaled(w, f) for part, w, f in weighted], [part.sums.size for part in parts]),
        bounded=_together(bounded) if len(bounded) == len(parts) else None,
        worst=max(worst) if len(worst) == len(parts) else None,
    )


def _mixed(parts: Sequence[Items], clusters: Sequence[int]) -> Items:
    """Return the items of several tasks, which have these numbers of clusters."""
    return Items(
        each=sum(part.each * k for part, k in zip(parts, clusters, strict=True)) / sum(clusters),
        rises=(sum(part.rises[0] for part in parts), sum(part.rises[1] for part in parts)),
        falls=(sum(part.falls[0] for part in parts), sum(part.falls[1] for part in parts)),
        assumed=max(part.assumed for part in parts),
        answers=all(part.answers for part in parts),
    )


def _together(parts: Sequence[Bounded]) -> Bounded:
    """Return the sums over the items of several tasks, with the widest range."""
    return Bounded(
        span=max(part.span for part in parts),
        rise=sum(part.rise for part in parts),
        fall=sum(part.fall for part in parts),
        squares=sum(part.squares for part in parts),
        plain=sum(part.plain for part in parts),
        units=sum(part.units for part in parts),
        spread=sum(part.spread for part in parts),
        variance=sum(part.variance for part in parts),
        answers=all(part.answers for part in parts),
    )
