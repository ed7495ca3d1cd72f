"""Differences between two configurations on the same items: means and ratios of sums, with tests and intervals.

Both use `changes`: the test flips the signs of clusters, and the interval excludes 0 exactly if the test rejects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from workbench.scores.changes import Bounded, Changes, Items, decided, likeness
from workbench.scores.signflips import TINY, tails
from workbench.scores.statistics import HIGHEST, MANY_CLUSTERS, Floats, clustered_rates, clustered_se, codes, ratio, upper_t
from workbench.scores.unseen import Standing, alone

PairT = TypeVar("PairT", bound="Pair")
_POWER = 0.8  # of the smallest difference that a test detects
_POWERED = upper_t(1 - _POWER, 10**6)
_RIGHT = (0, 1, 100)  # scores of a right answer if all others score 0: as a share or a percentage; 0 if there is none
_ASSUMED = 1 / 2  # of a metric's range, by which an item that was not drawn may move


@dataclass(frozen=True)
class Pair(ABC):
    """A difference b - a over paired items, with its test. `interval(level)` excludes 0 exactly if p <= level.

    Attributes:
        n: Number of items.
        clusters: Number of clusters.
        diff: The difference.
        se: Cluster-robust standard error of `diff`; 0 if no item changed or all clusters changed by the same amount.
        wins: Number of items whose score rose.
        losses: Number of items whose score fell.
        changes: Data of the test.
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
        """True if no item has another score."""
        return self.wins == self.losses == 0

    @cached_property
    def p(self) -> float:
        """Two-sided p value of "no difference"."""
        return 1.0 if self.unchanged else alone(self.changes).p

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Return the two-sided interval of confidence 1 - level."""
        return self.within(self.changes.critical(level), self.p <= level)

    def within(self, critical: float, rejected: bool) -> tuple[float, float]:
        """Return the interval at a critical value, such as a family's; it excludes 0 exactly if the test rejected."""
        return (0.0, 0.0) if self.unchanged else self._within(critical, rejected)

    @abstractmethod
    def _within(self, critical: float, rejected: bool) -> tuple[float, float]: ...

    def excludes(self, size: float, side: int, level: float) -> bool:
        """Return True if a change of `diff` of this size or more to a side is excluded, see `Changes.excludes`."""
        return self.changes.excludes(self._units(size, side), side, level)

    def needs_to_exclude(self, size: float, side: int, level: float) -> int | None:
        """Return the approximate number of items that would exclude a change of this size; None if none would."""
        return self._items(self.changes.excluded_at(self._units(size, side), side, level))

    def needs_to_stand(self, standing: Standing, level: float) -> int | None:
        """Return the approximate number of items at which unseen clusters would leave a p of `level`; None if none would."""
        return self._items(standing.enough(level))

    def _items(self, times: float | None) -> int | None:
        return None if times is None else math.ceil(self.n * times)

    def _units(self, size: float, side: int) -> float:
        """Return the size of a change of `diff` in the units of the test."""
        return size

    def withstands(self, standing: Standing, level: float) -> float | None:
        """Return the change of an unseen item up to which the verdict holds, see `Standing`; None if it depends on none."""
        return standing.withstands(level)

    def mde(self, critical: float | None = None, standing: Standing | None = None, level: float = 0.05) -> float | None:
        """Return the smallest true difference that a test detects with a probability of 80 %; None if the differences have no spread.

        Args:
            critical: Critical value of the test; default: that of a single test at 5 %.
            standing: The row in its family, whose p decides; default: an interval decides, which has this critical value.
            level: Level of `standing`.
        """
        if not TINY < self.se < math.inf:
            return None
        t = self._t(critical)
        if not math.isfinite(t):
            return None
        return (t * (standing.needed(t, level) if standing else 1.0) + _POWERED) * self.se

    def _t(self, critical: float | None) -> float:
        return self.changes.as_t(self.changes.critical(0.05) if critical is None else critical)

    def needs(
        self, effect: float, critical: float | None = None, standing: Standing | None = None, level: float = 0.05
    ) -> int | None:
        """Return the approximate number of items that would detect a difference of this size, enough for at least 20 clusters.

        The critical mean of the flips falls with the root of the number of items, that of an unseen cluster with the number.
        """
        smallest = self.mde(critical, standing, level)
        if smallest is None or effect <= 0:
            return None
        t, error = self._t(critical), self.se / effect
        by_flips = (t + _POWERED) * error
        by_unseen = (_POWERED * error + math.sqrt((_POWERED * error) ** 2 + 4 * (smallest / effect - _POWERED * error))) / 2
        times = max(by_flips, by_unseen) ** 2 if smallest > (t * (1 + 1e-9) + _POWERED) * self.se else by_flips**2
        return max(math.ceil(self.n * times), math.ceil(self.n * MANY_CLUSTERS / self.clusters))


def tested_together(pairs: Sequence[PairT]) -> list[PairT]:
    """Return pairs over the same clusters with their p values, computed in one pass over the sign patterns."""
    if not pairs:
        return []
    p = tails(np.stack([pair.changes.sums for pair in pairs], 1))
    return [replace(pair, changes=replace(pair.changes, tested=float(x))) for pair, x in zip(pairs, p, strict=True)]


@dataclass(frozen=True)
class Paired(Pair):
    """Mean difference b - a over paired items."""

    def _within(self, critical: float, rejected: bool) -> tuple[float, float]:
        return self.changes.interval(critical, rejected)


class Limits(TypedDict, total=False):
    """What is known of the largest changes, see `paired`."""

    span: float | None
    reach: float
    worst: float | None


def paired(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    cluster: Sequence[Any] | NDArray[Any] | None = None,
    *,
    span: float | None = None,
    reach: float = 0.0,
    worst: float | None = None,
) -> Paired:
    """Compare the scores `b` of a configuration with those `a` of the baseline on the same items, in the same order.

    Args:
        a: Scores of the baseline.
        b: Scores of the configuration.
        cluster: One label per item; default: each item is its own cluster.
        span: Largest possible change of an item for intervals, infinite for no limit; default: 1 if all scores lie in [0, 1], the size of a
            right answer if items are right or wrong, else no limit.
        reach: Largest possible change of an item as its metric declares it; 0 if it declares none.
        worst: Largest change of a cluster's mean; default: `span`.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    label = np.arange(x.size, dtype=np.intp) if cluster is None else codes(cluster)
    if not x.size or x.shape != y.shape or label.shape != x.shape:
        raise ValueError(f"expected paired items, got {x.size} and {y.size} scores with {label.size} cluster labels")
    d, k = y - x, int(label.max()) + 1
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    answers = span != math.inf and high in _RIGHT and all(((v == 0) | (v == high)).all() for v in (x, y))
    if span is None and low >= 0 and (high <= 1 or answers):
        span = float(high) if answers and high else 1.0
    each, se = d.size / k, clustered_se(d, label)
    bounded = None
    if span is not None and math.isfinite(span):
        bounded = Bounded(
            span=span,
            rise=float(d[d > 0].sum()),
            fall=float(-d[d < 0].sum()),
            squares=float(d @ d),
            plain=float(d.sum()),
            units=float(d.size),
            spread=float(np.square(d - d.mean()).sum()),
            variance=(se * d.size) ** 2,
            answers=answers,
        )
    assumed = _ASSUMED * reach if worst is None else worst / likeness(each)
    if answers and bounded:
        assumed = bounded.span if worst is None else min(bounded.span, assumed)
    changes = Changes(
        _by_cluster(d, label),
        _by_cluster(np.ones(d.size), label),
        Items.of(each, d, np.ones(d.size), assumed, answers),
        bounded,
        bounded.span if worst is None and bounded else worst,
    )
    wins, losses = int((d > TINY).sum()), int((d < -TINY).sum())
    return Paired(x.size, k, float(d.mean()), se, wins, losses, changes)


def paired_scores(
    kind: str | None,
    a: Floats,
    b: Floats,
    cluster: Sequence[Any] | NDArray[Any] | None = None,
    weights: Floats | None = None,
    **limits: Unpack[Limits],
) -> Paired | Ratio:
    """Compare a metric of a configuration with the baseline's on the same items; `statistics.score` says what the values are.

    Contributions to a metric of a whole corpus have no range, even if the metric has one.
    """
    if kind is None:
        return paired(a, b, cluster, **limits)
    if weights is None:
        return paired(a, b, cluster, span=math.inf, worst=limits.get("worst"))
    return paired_ratio(kind, a, b, weights, cluster, worst=limits.get("worst"))


@dataclass(frozen=True)
class Ratio(Pair):
    """Difference b - a of a corpus metric over paired items, in the metric's units.

    The test uses the rates, -sum of numerators / sum of weights: their difference is a weighted mean of paired differences, whose interval
    is +- t * the jackknife error. The interval of a difference of perplexities is the range of exp(rate b) - exp(rate a) over the joint
    confidence ellipse of both rates, so that it excludes 0 exactly if the interval of the rates' difference does.
    """

    _kind: str = field(repr=False)
    _rates: Floats = field(repr=False)  # of a and b, in nats per unit of weight
    _covariance: Floats = field(repr=False)

    def _within(self, critical: float, rejected: bool) -> tuple[float, float]:
        a, b = (float(rate) for rate in self._rates)
        t = self.changes.as_t(critical)
        if not math.isfinite(t) or not math.isfinite(self._covariance[0, 0]):
            return decided(-math.inf, math.inf, b - a, rejected)
        half = t * _error_between(self._covariance)
        low, high = decided(b - a - half, b - a + half, b - a, rejected)
        if self._kind == "bits_per_byte":
            return low / math.log(2), high / math.log(2)
        return _image(a, b - a, (low, high), t, self._covariance)

    def withstands(self, standing: Standing, level: float) -> float | None:
        """Return that change in bits per byte; a perplexity's depends on the text, and is None."""
        found = standing.withstands(level)
        return found / math.log(2) if self._kind == "bits_per_byte" and found is not None else None

    def _units(self, size: float, side: int) -> float:
        if self._kind == "bits_per_byte":
            return size * math.log(2)
        before = math.exp(min(float(self._rates[0]), HIGHEST))
        return side * math.log(1 + side * size / before) if side > 0 or size < before else math.inf


def paired_ratio(
    kind: str,
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    cluster: Sequence[Any] | NDArray[Any] | None = None,
    *,
    worst: float | None = None,
) -> Ratio:
    """Compare a corpus metric of a configuration with the baseline's on the same items, in the same order.

    Args:
        kind: Kind of ratio, one of `statistics.RATIOS`.
        a: Numerators of the baseline.
        b: Numerators of the configuration.
        weights: Weights of the items, which both share.
        cluster: One label per item; default: each item is its own cluster.
        worst: Largest change of a cluster's metric; default: not known.
    """
    x, y, w = (np.asarray(v, np.float64) for v in (a, b, weights))
    label = np.arange(x.size, dtype=np.intp) if cluster is None else codes(cluster)
    if not x.size or not x.shape == y.shape == w.shape == label.shape:
        raise ValueError(
            f"expected paired items, got {x.size} and {y.size} numerators with {w.size} weights, {label.size} cluster labels"
        )
    d, k = x - y, int(label.max()) + 1  # in nats, like the rates: positive if b is less likely
    rates, covariance, df = clustered_rates(np.stack([-x, -y]), w, label)
    before, after = (ratio(kind, v, w) for v in (x, y))
    slopes = np.full(2, 1 / math.log(2)) if kind == "bits_per_byte" else np.array([before, after])
    slopes[0] *= -1
    se = math.sqrt(max(float(slopes @ covariance @ slopes), 0.0)) if math.isfinite(df) else math.inf
    rose, fell = int((d > TINY).sum()), int((d < -TINY).sum())
    each, some = x.size / k, w > 0
    items = Items.of(each, d[some] / w[some], w[some])
    pair = Ratio(
        x.size,
        k,
        after - before,
        se,
        rose,
        fell,
        Changes(_by_cluster(d, label), _by_cluster(w, label), items),
        kind,
        rates,
        covariance,
    )
    if worst is None:
        return pair
    most = pair._units(worst, 1)
    return replace(pair, changes=replace(pair.changes, items=replace(items, assumed=most / likeness(each)), worst=most))


def _error_between(covariance: Floats) -> float:
    """Return the standard error of the difference of two rates."""
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return math.sqrt(variance) if variance > TINY**2 else 0.0


def _image(a: float, shift: float, ends: tuple[float, float], t: float, covariance: Floats) -> tuple[float, float]:
    """Return the range of exp(a + shift) - exp(a) for (shift, a) on the ellipse of radius t whose shifts reach `ends`."""
    angle = np.linspace(-np.pi, np.pi, 1025)  # the grid includes 0 and +-pi, where the shifts reach their ends
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
