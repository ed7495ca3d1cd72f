"""Differences of two configurations on the same items: one test, one interval, for means and for ratios of sums.

The test flips the signs of clusters (`signflips`). The interval of scores without a range inverts the flipped statistic,
(S - N x)^2 / sum over clusters (s - n x)^2, at the value of Student's t with the effective number of clusters less 1; for clusters of equal
size this is the cluster-robust t interval. Of scores with a range it inverts a score statistic at the same t,

    z(x)^2 = (S - N x)^2 / V(x),    V(x) = D R(x) sum over items (d - x)^2,

of items d in clusters of n with sums s, S and N in total. D is the design effect: clustered variance over that of independent items, at least 1 for right and wrong
items. R, the variance that items of this range have at least at mean x over the one that was seen, is Tango's (1998): without it, two losses
and no win in 240 items would exclude a true loss of 2 points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from workbench.signflips import TINY, tails
from workbench.statistics import (
    HIGHEST,
    MANY_CLUSTERS,
    Floats,
    clustered_rates,
    clustered_se,
    codes,
    effective_clusters,
    ratio,
    upper_t,
)

_HALVINGS = 60
PairT = TypeVar("PairT", bound="Pair")


@dataclass(frozen=True)
class Changes:
    """What the test and the interval of a mean difference rest on.

    Attributes:
        sums, sizes: Of differences and of weights, by cluster [k].
        rise, fall: Sums of the positive and of the negative differences, both as positive numbers.
        span: Largest possible change of an item; None without a bound.
        variance: Clustered, of the sum of differences; like `spread` and `squares` of use where there is a span.
        spread: Sum over items of (d - mean)^2, which is that variance for independent items.
        squares: Sums over items of w^2 d^2, w^2 d and w^2, where w is 1 but for pooled tasks.
        answers: Whether items are right or wrong.
        tested: The p of the sign-flip test, where it was found together with other rows'.
    """

    sums: Floats
    sizes: Floats
    rise: float
    fall: float
    span: float | None
    variance: float
    spread: float
    squares: tuple[float, float, float]
    answers: bool = False
    tested: float | None = None

    @cached_property
    def effective(self) -> float:
        """How many clusters of equal size are worth as much as these."""
        return effective_clusters(self.sizes)

    @cached_property
    def mean(self) -> float:
        """The mean difference."""
        total, weight = self._totals
        return total / weight

    @cached_property
    def _totals(self) -> tuple[float, float]:
        """S and N."""
        return float(self.sums.sum()), float(self.sizes.sum())

    @cached_property
    def scale(self) -> float:
        """What a family divides the sum by, so that its rows are alike: a number that no flip of signs changes."""
        return math.sqrt(max(float(self.sums @ self.sums), self.squares[0] if self.answers else 0.0))

    @cached_property
    def p(self) -> float:
        """Two-sided, of "no difference": the sign-flip test."""
        return float(tails(self.sums[:, None])[0]) if self.tested is None else self.tested

    def critical(self, level: float) -> float:
        """Return what |S| / scale has to exceed for a single test at this two-sided level: Student's t in terms of the flipped statistic."""
        t = upper_t(level / 2, self.effective - 1)
        return t * math.sqrt(self.effective / (self.effective - 1 + t * t))

    def interval(self, critical: float, rejected: bool) -> tuple[float, float]:
        """Return all means x with z(x) at most the t that belongs to a critical value.

        Args:
            critical: In terms of the flipped statistic.
            rejected: Whether the test rejects "no difference". The interval excludes 0 exactly then: where t and sign flips differ, the end
                that is nearer to 0 moves to it.
        """
        return _decided(self._end(critical, -1), self._end(critical, 1), self.mean, rejected)

    def _end(self, critical: float, side: int) -> float:
        """Return one end."""
        total, weight = self._totals
        t = _as_t(critical, self.effective)
        if self.effective <= 1 + 1e-9 or not math.isfinite(t):
            return side * (math.inf if self.span is None else self.span)
        if self.span is None:  # a quadratic equation, whose leading number is positive where t is finite
            sums, cross, sizes = (
                float(x @ y) for x, y in ((self.sums, self.sums), (self.sums, self.sizes), (self.sizes, self.sizes))
            )
            a, b, c = weight**2 - critical**2 * sizes, critical**2 * cross - weight * total, total**2 - critical**2 * sums
            return (-b + side * math.sqrt(max(b * b - a * c, 0.0))) / a
        # Halving between the mean, where z is 0, and a value that lies outside.
        inside, outside = self.mean, side * self.span
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if (total - weight * middle) ** 2 <= t * t * self._variance(middle):
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    @cached_property
    def _design(self) -> float:
        """D; 1 where all items change alike, so that it cannot be estimated."""
        effect = self.variance / self.spread if self.spread > TINY else 1.0
        return max(effect, 1.0) if self.answers else effect

    def _variance(self, x: float) -> float:
        """V(x)."""
        squares, plain, units = self.squares
        return self._design * max(squares - 2 * x * plain + x * x * units, 0.0) * self._bounded(x)

    def _bounded(self, x: float) -> float:
        """R(x): Tango's variance of items that rise, fall or stay, over the one with the shares that were seen.

        Items that change by less than the whole range count as parts of such items. With shares q + x of rises and q of falls the likelihood
        is largest where 2 N q^2 - (rise + fall + x (rise - fall) - 2 N x) q - fall x (1 - x) = 0.
        """
        if self.span is None:
            return 1.0
        rise, fall, x, n = self.rise / self.span, self.fall / self.span, x / self.span, self._totals[1]
        seen = rise + fall - 2 * x * (rise - fall) + n * x * x
        if seen <= TINY * n:
            return 1.0
        b, c = 2 * n * x - (rise + fall) - x * (rise - fall), -fall * x * (1 - x)
        q = max((math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n), 0.0, -x)
        return max(n * (2 * q + x - x * x), 0.0) / seen


def tested_together(pairs: Sequence[PairT]) -> list[PairT]:
    """The same pairs, all over the same clusters, with their p values from one run over the sign patterns."""
    if not pairs:
        return []
    p = tails(np.stack([pair.changes.sums for pair in pairs], 1))
    return [replace(pair, changes=replace(pair.changes, tested=float(x))) for pair, x in zip(pairs, p, strict=True)]


def pooled(parts: Sequence[Changes], scales: Sequence[float] | None = None) -> Changes:
    """Return the changes of a mean over tasks, whose clusters are independent of each other.

    Args:
        parts: Changes by task; every task counts alike, whatever its number of items.
        scales: What each task's differences are multiplied by, such as 1 / (1 - chance).
    """
    factors = scales or [1.0] * len(parts)
    items = sum(float(part.sizes.sum()) for part in parts)
    weights = [items / (len(parts) * float(part.sizes.sum())) for part in parts]
    both = list(zip(parts, weights, factors, strict=True))
    spans = [None if part.span is None else part.span * f for part, _, f in both]
    squares = [(w * w * f * f * part.squares[0], w * w * f * part.squares[1], w * w * part.squares[2]) for part, w, f in both]
    return Changes(
        sums=np.concatenate([w * f * part.sums for part, w, f in both]),
        sizes=np.concatenate([w * part.sizes for part, w, _ in both]),
        rise=sum(w * f * part.rise for part, w, f in both),
        fall=sum(w * f * part.fall for part, w, f in both),
        span=None if None in spans else max(s for s in spans if s is not None),
        variance=sum((w * f) ** 2 * part.variance for part, w, f in both),
        spread=sum((w * f) ** 2 * part.spread for part, w, f in both),
        squares=(sum(s[0] for s in squares), sum(s[1] for s in squares), sum(s[2] for s in squares)),
        answers=all(part.answers for part in parts),
    )


@dataclass(frozen=True)
class Pair(ABC):
    """A difference b - a over paired items, with its test. `interval(level)` excludes 0 exactly when p <= level.

    Attributes:
        se: Cluster-robust standard error of `diff`; 0 if no item changed, or all clusters changed alike.
        p: Two-sided, of "no difference".
        wins, losses: Items whose score rose, fell.
        changes: What the test rests on.
    """

    n: int
    clusters: int
    diff: float
    se: float
    wins: int
    losses: int
    changes: Changes

    @property
    def unchanged(self) -> bool:
        """No item has another score."""
        return self.wins == self.losses == 0

    @property
    def p(self) -> float:
        """Two-sided, of "no difference"."""
        return 1.0 if self.unchanged else self.changes.p

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided interval of confidence 1 - level."""
        return self.within(self.changes.critical(level), self.p <= level)

    def within(self, critical: float, rejected: bool) -> tuple[float, float]:
        """Interval at a critical value, a family's for instance; it excludes 0 exactly if the test rejected."""
        return (0.0, 0.0) if self.unchanged else self._within(critical, rejected)

    @abstractmethod
    def _within(self, critical: float, rejected: bool) -> tuple[float, float]: ...

    def mde(self, critical: float | None = None, power: float = 0.8) -> float | None:
        """Smallest true difference that a test finds with this power; None if no spread was seen.

        Args:
            critical: Of the test; that of a single test at 5 % if not given.
        """
        if not TINY < self.se < math.inf:
            return None
        t = _as_t(self.changes.critical(0.05) if critical is None else critical, self.changes.effective)
        return (t + upper_t(1 - power, 10**6)) * self.se if math.isfinite(t) else None

    def needs(self, effect: float, critical: float | None = None, power: float = 0.8) -> int | None:
        """Items, about, at which a difference of this size would be found; at least as many as make 20 clusters."""
        smallest = self.mde(critical, power)
        if smallest is None or effect <= 0:
            return None
        return max(math.ceil(self.n * (smallest / effect) ** 2), math.ceil(self.n * MANY_CLUSTERS / self.clusters))


def _decided(low: float, high: float, middle: float, rejected: bool) -> tuple[float, float]:
    """Return an interval that excludes 0 exactly if the test rejected: else the end that is nearer to 0 moves to it."""
    if rejected:
        least = TINY * max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else TINY
        return (max(low, least), high) if middle > 0 else (low, min(high, -least))
    return min(low, 0.0), max(high, 0.0)


def _as_t(critical: float, effective: float) -> float:
    """Student's t to a critical value of z."""
    left = effective - critical**2
    return critical * math.sqrt((effective - 1) / left) if left > TINY else math.inf


@dataclass(frozen=True)
class Paired(Pair):
    """Mean difference b - a over paired items."""

    def _within(self, critical: float, rejected: bool) -> tuple[float, float]:
        return self.changes.interval(critical, rejected)


def paired(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, cluster: Sequence[Any] | None = None, *, span: float | None = None
) -> Paired:
    """Compare the scores `b` of a configuration with those `a` of the baseline on the same items, in the same order.

    Args:
        cluster: A label an item; every item its own cluster if not given.
        span: Largest possible change of an item; 1 where all scores lie in [0, 1], else none if not given.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    label = np.arange(x.size, dtype=np.intp) if cluster is None else codes(list(cluster))
    if not x.size or x.shape != y.shape or label.shape != x.shape:
        raise ValueError(f"paired items expected, got {x.size} and {y.size} scores with {label.size} clusters")
    d, k = y - x, int(label.max()) + 1
    if span is None and min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= 1:
        span = 1.0
    se = clustered_se(d, label)
    changes = Changes(
        sums=_by_cluster(d, label),
        sizes=_by_cluster(np.ones(d.size), label),
        rise=float(d[d > 0].sum()),
        fall=float(-d[d < 0].sum()),
        span=span,
        variance=(se * d.size) ** 2,
        spread=float(np.square(d - d.mean()).sum()),
        squares=(float(d @ d), float(d.sum()), float(d.size)),
        answers=bool(np.isin(x, (0.0, 1.0)).all() and np.isin(y, (0.0, 1.0)).all()),
    )
    wins, losses = int((d > TINY).sum()), int((d < -TINY).sum())
    return Paired(x.size, k, float(d.mean()), se, wins, losses, changes)


@dataclass(frozen=True)
class Ratio(Pair):
    """Difference b - a of one corpus metric, in the metric's units, over paired items.

    Tested on the rates, -sum of numerators / sum of weights: their difference is one weighted mean of paired differences, whose interval
    is +- t * the jackknife's error. The interval of a difference of perplexities is the range of exp(rate b) - exp(rate a) over the joint confidence ellipse of both rates, so that it
    excludes 0 exactly when the interval of the rates' difference does.
    """

    _kind: str = field(repr=False)
    _rates: Floats = field(repr=False)  # of a and b, nats a unit of weight
    _covariance: Floats = field(repr=False)

    def _within(self, critical: float, rejected: bool) -> tuple[float, float]:
        if not math.isfinite(self._covariance[0, 0]):
            return -math.inf, math.inf
        a, b = (float(rate) for rate in self._rates)
        t = _as_t(critical, self.changes.effective)
        half = t * _error_between(self._covariance)
        low, high = _decided(b - a - half, b - a + half, b - a, rejected)
        if self._kind == "bits_per_byte":
            return low / math.log(2), high / math.log(2)
        return _image(a, b - a, (low, high), t, self._covariance)


def paired_ratio(
    kind: str,
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    cluster: Sequence[Any] | None = None,
) -> Ratio:
    """Compare a corpus metric of a configuration, numerators `b`, with the baseline's, numerators `a`, on items of equal weights."""
    x, y, w = (np.asarray(v, np.float64) for v in (a, b, weights))
    label = np.arange(x.size, dtype=np.intp) if cluster is None else codes(list(cluster))
    if not x.size or not x.shape == y.shape == w.shape == label.shape:
        raise ValueError(
            f"paired items expected, got {x.size} and {y.size} numerators with {w.size} weights, {label.size} clusters"
        )
    d, k = x - y, int(label.max()) + 1  # in nats, as the rates: above 0 where b is less likely
    rates, covariance, df = clustered_rates(np.stack([-x, -y]), w, label)
    before, after = (ratio(kind, v, w) for v in (x, y))
    slopes = np.full(2, 1 / math.log(2)) if kind == "bits_per_byte" else np.array([before, after])
    slopes[0] *= -1
    se = math.sqrt(max(float(slopes @ covariance @ slopes), 0.0)) if math.isfinite(df) else math.inf
    rose, fell = int((d > TINY).sum()), int((d < -TINY).sum())
    changes = Changes(
        sums=_by_cluster(d, label),
        sizes=_by_cluster(w, label),
        rise=float(d[d > 0].sum()),
        fall=float(-d[d < 0].sum()),
        span=None,
        variance=0.0,
        spread=0.0,
        squares=(0.0, 0.0, 0.0),
    )
    return Ratio(x.size, k, after - before, se, rose, fell, changes, kind, rates, covariance)


def _error_between(covariance: Floats) -> float:
    """Standard error of the difference of two rates."""
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return math.sqrt(variance) if variance > TINY**2 else 0.0


def _image(a: float, shift: float, ends: tuple[float, float], t: float, covariance: Floats) -> tuple[float, float]:
    """Range of exp(a + shift) - exp(a) where (shift, a) runs along the ellipse of radius t whose shifts reach `ends`."""
    if not all(map(math.isfinite, (*ends, t))):
        return -math.inf, math.inf
    angle = np.linspace(-np.pi, np.pi, 1025)  # 0 and +-pi are on the grid: where shifts end
    x, y = np.cos(angle), np.sin(angle)
    error = _error_between(covariance)
    along = float(covariance[0, 1] - covariance[0, 0]) / error if error else 0.0
    across = math.sqrt(max(float(covariance[0, 0]) - along**2, 0.0))
    shifts = shift + np.where(x >= 0, x * (ends[1] - shift), -x * (ends[0] - shift))
    starts = a + t * (along * x + across * y)
    values = np.exp(np.minimum(starts + shifts, HIGHEST)) - np.exp(np.minimum(starts, HIGHEST))
    return float(values.min()), float(values.max())


def _by_cluster(values: Floats, cluster: NDArray[np.intp]) -> Floats:
    return np.bincount(cluster, values).astype(np.float64)
