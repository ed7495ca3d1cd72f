"""Statistics of scores on the same items: paired, clustered, corrected for the size of the family.

Items that share a cluster (a template, a passage) are not independent, so every standard error, test and resampling works on
clusters. Sources: Miller 2024, arXiv 2411.00640 (paired differences, clustered standard errors); Holm 1979; Wilson 1927;
Newcombe 1998 (square-and-add intervals); sign-flip tests and their inversion, Pitman 1937. Ratios of
sums: delete-one-cluster jackknife, Efron 1982.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEW_CLUSTERS = 8  # below this no verdict is given
T_CLUSTERS = 20  # from here on the cluster-robust t is used; below it, exact sign flips
TINY = 1e-12
RATIOS = ("perplexity", "weighted_perplexity", "bits_per_byte")  # lm-eval's names of the aggregations
_HIGHEST = 700.0  # nats whose exponential is still a number


def upper_t(tail: float, df: float) -> float:
    """Upper quantile of Student's t."""
    from scipy.special import stdtrit

    return float(-stdtrit(max(df, 1), tail))


def brier_score(right: int, probabilities: Sequence[float]) -> float:
    """Return the Brier score of one item: squared distances of the choices' probabilities from 1 for the right one and 0 for the others."""
    return float(sum((p - (i == right)) ** 2 for i, p in enumerate(probabilities)))


def codes(labels: Sequence[Any]) -> NDArray[np.intp]:
    """Cluster labels as numbers 0..k-1, in order of first appearance."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.intp)


def clustered_se(values: Floats, cluster: NDArray[np.intp]) -> float:
    """Cluster-robust standard error of a mean, with the k/(k-1) correction (CR1). One cluster: infinite."""
    k = int(cluster.max()) + 1
    if k < 2:
        return math.inf
    deviations = np.bincount(cluster, values, k) - np.bincount(cluster, minlength=k) * values.mean()
    return float(np.sqrt((deviations**2).sum() * k / (k - 1)) / values.size)


def score_interval(values: Floats, cluster: NDArray[np.intp], alpha: float = 0.05) -> tuple[float, float]:
    """Interval of one mean score.

    Right/wrong items: Wilson's interval on the effective number of items, n / design effect, with a t quantile. The design effect
    is the clustered variance over the binomial one, at least 1; with no or all items right it cannot be estimated and is taken
    as 1, so 0 of 40 gives [0, 0.09] and not [0, 0]. Other scores: mean +- t * clustered SE, cut to [0, 1] if all values lie there.
    """
    n, k, mean = values.size, int(cluster.max()) + 1, float(values.mean())
    inside = bool(values.min() >= 0 and values.max() <= 1)
    if k < 2:
        return (0.0, 1.0) if inside else (-math.inf, math.inf)
    t, se = upper_t(alpha / 2, k - 1), clustered_se(values, cluster)
    if not np.isin(values, (0.0, 1.0)).all():
        low, high = mean - t * se, mean + t * se
        return (max(low, 0.0), min(high, 1.0)) if inside else (low, high)
    spread = mean * (1 - mean)
    effective = n / max(1.0, se**2 * n / spread) if spread > TINY else n
    share = effective + t**2
    centre = (mean * effective + t**2 / 2) / share
    half = t * math.sqrt(spread * effective + t**2 / 4) / share
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Pair(ABC):
    """A difference b - a over paired items, with its test. `interval(level)` excludes 0 exactly when p <= level.

    Attributes:
        se: Cluster-robust standard error of `diff`; 0 if no item changed, or all clusters changed alike.
        p: Two-sided, of "no difference".
        wins, losses: Items whose score rose, fell.
        df: Degrees of freedom of the t quantiles.
    """

    n: int
    clusters: int
    diff: float
    se: float
    p: float
    wins: int
    losses: int
    df: float

    @property
    def unchanged(self) -> bool:
        """No item has another score."""
        return self.wins == self.losses == 0

    @abstractmethod
    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided interval of confidence 1 - level."""

    def mde(self, level: float = 0.05, power: float = 0.8) -> float | None:
        """Smallest true difference that a test at this level finds with this power; None if no spread was seen."""
        if not TINY < self.se < math.inf:
            return None
        return (upper_t(level / 2, self.df) + upper_t(1 - power, 10**6)) * self.se

    def needs(self, effect: float, level: float = 0.05, power: float = 0.8) -> int | None:
        """Items, about, at which a difference of this size would be found; at least as many as make 20 clusters."""
        smallest = self.mde(level, power)
        if smallest is None or effect <= 0:
            return None
        return max(math.ceil(self.n * (smallest / effect) ** 2), math.ceil(self.n * T_CLUSTERS / self.clusters))


@dataclass(frozen=True)
class Paired(Pair):
    """Mean difference b - a over paired items, its test and its intervals.

    The test is the cluster-robust t with k-1 degrees of freedom from 20 clusters on, and the exact sign-flip test over all 2^k signs
    of the cluster sums below. `interval(level)` inverts the same test. Where all clusters changed alike there is nothing to invert,
    and the interval is Newcombe's.
    """

    _a: Floats = field(repr=False)
    _b: Floats = field(repr=False)
    _cluster: NDArray[np.intp] = field(repr=False)

    @property
    def bounded(self) -> bool:
        """Both scores lie in [0, 1], so the difference lies in [-1, 1]."""
        return bool(min(self._a.min(), self._b.min()) >= 0 and max(self._a.max(), self._b.max()) <= 1)

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided interval of confidence 1 - level."""
        if self.unchanged:
            return 0.0, 0.0
        if self.se < TINY:
            low, high = self._square_and_add(level)
        elif self.clusters < T_CLUSTERS:
            low, high = flip_interval(*_cluster_sums(self._b - self._a, self._cluster), level)
        else:
            half = upper_t(level / 2, self.df) * self.se
            low, high = self.diff - half, self.diff + half
        return (max(low, -1.0), min(high, 1.0)) if self.bounded else (low, high)

    def _square_and_add(self, level: float) -> tuple[float, float]:
        """Newcombe's interval from the two single scores, for differences without any spread between clusters."""
        (la, ua), (lb, ub) = (score_interval(x, self._cluster, level) for x in (self._a, self._b))
        a, b = float(self._a.mean()), float(self._b.mean())
        return self.diff - math.hypot(b - lb, ua - a), self.diff + math.hypot(ub - b, a - la)


def paired(a: Sequence[float] | Floats, b: Sequence[float] | Floats, cluster: Sequence[Any] | None = None) -> Paired:
    """Compare the scores `b` of a configuration with those `a` of the baseline on the same items, in the same order."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    label = np.arange(x.size, dtype=np.intp) if cluster is None else codes(list(cluster))
    if not x.size or x.shape != y.shape or label.shape != x.shape:
        raise ValueError(f"paired items expected, got {x.size} and {y.size} scores with {label.size} clusters")
    d, k = y - x, int(label.max()) + 1
    se = clustered_se(d, label)
    wins, losses = int((d > TINY).sum()), int((d < -TINY).sum())
    p = 1.0 if wins == losses == 0 else p_value(_cluster_sums(d, label)[0], float(d.mean()), se, k - 1)
    return Paired(x.size, k, float(d.mean()), se, p, wins, losses, k - 1, x, y, label)


def p_value(sums: Floats, diff: float, se: float, df: float) -> float:
    """Two-sided p of "the differences have mean 0", from their sums by cluster."""
    k = sums.size
    if k < T_CLUSTERS:
        return float((np.abs(_signed(sums)) >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()).mean())
    if se < TINY:
        if not np.abs(sums).max() > TINY:  # items changed, but no cluster's sum did
            return 1.0
        return float(2.0 ** (1 - k))  # all clusters alike: only the sign-flip test has something to say
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(diff) / se))


def flip_interval(sums: Floats, sizes: Floats, level: float) -> tuple[float, float]:
    """Inverted sign-flip test of "sums - shift * sizes are symmetric about 0": for each pattern of signs, the shifts that it does
    not contradict end at a known point. Infinite where no pattern may be spared at this level."""
    flipped, weight, total = _signed(sums), _signed(sizes), sizes.sum()
    tiny = TINY * total
    plus = (sums.sum() + flipped) / np.maximum(total + weight, tiny)
    rest = total - weight
    with np.errstate(divide="ignore", invalid="ignore"):
        minus = (sums.sum() - flipped) / rest
    never = rest < tiny  # the pattern of equal signs fits every shift
    upper = np.sort(np.where(never, math.inf, np.maximum(plus, minus)))[::-1]
    lower = np.sort(np.where(never, -math.inf, np.minimum(plus, minus)))
    spare = math.floor(level * upper.size + 1e-9)
    return float(lower[spare]), float(upper[spare])


def ratio(kind: str, numerators: Sequence[float] | Floats, weights: Sequence[float] | Floats) -> float:
    """A corpus metric: exp(-sum of numerators / sum of weights) for perplexities, the same quotient in bits for bits_per_byte.

    Numerators are log-likelihoods in nats. Above 700 nats a unit a perplexity stays at exp(700).
    """
    if kind not in RATIOS:
        raise ValueError(f"kind of ratio {kind!r}: expected one of {', '.join(RATIOS)}")
    rate = -float(np.sum(numerators)) / float(np.sum(weights))
    return rate / math.log(2) if kind == "bits_per_byte" else math.exp(min(rate, _HIGHEST))


def ratio_interval(
    kind: str,
    numerators: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    cluster: NDArray[np.intp],
    alpha: float = 0.05,
) -> tuple[float, float]:
    """Interval of one corpus metric: rate +- t * jackknife error in nats, then the metric of its ends.

    Clusters are deleted one at a time, and t has K-1 degrees of freedom, K = (sum of weights)^2 / sum of squared weights of
    clusters: one long document among short ones is worth few documents. For equal weights this is the clustered error of a mean.
    A percentile bootstrap of clusters covers less where clusters are few or differ in weight; tests/test_error_rates.py compares.
    """
    x = np.asarray(numerators, np.float64)
    (rate,), covariance, df = _rates(-x[None], np.asarray(weights, np.float64), cluster)
    if not math.isfinite(df):
        return (0.0 if kind == "bits_per_byte" else 1.0), math.inf
    half = upper_t(alpha / 2, df) * math.sqrt(covariance[0, 0])
    return ratio(kind, [half - rate], [1.0]), ratio(kind, [-half - rate], [1.0])


@dataclass(frozen=True)
class Ratio(Pair):
    """Difference b - a of one corpus metric, in the metric's units, over paired items.

    Tested on the rates, -sum of numerators / sum of weights: their difference is one weighted mean of paired differences, so that
    the t test (from 20 clusters on) and the sign-flip test (below) are those of `Paired`, with the jackknife error. The interval of a
    difference of perplexities is the range of exp(rate b) - exp(rate a) over the joint confidence ellipse of both rates, so that
    it excludes 0 exactly when the interval of the rates' difference does.
    """

    _kind: str = field(repr=False)
    _rates: Floats = field(repr=False)  # of a and b, nats a unit of weight
    _covariance: Floats = field(repr=False)
    _sums: Floats = field(repr=False)
    _sizes: Floats = field(repr=False)

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided interval of confidence 1 - level."""
        if self.unchanged:
            return 0.0, 0.0
        if not math.isfinite(self.df):
            return -math.inf, math.inf
        a, b = self._rates
        error, t = _error_between(self._covariance), upper_t(level / 2, self.df)
        low, high = b - a - t * error, b - a + t * error
        if self.clusters < T_CLUSTERS:
            low, high = flip_interval(self._sums, self._sizes, level)
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
    rates, covariance, df = _rates(np.stack([-x, -y]), w, label)
    before, after = (ratio(kind, v, w) for v in (x, y))
    sums, sizes = (np.bincount(label, v, k).astype(np.float64) for v in (d, w))
    error = _error_between(covariance)
    slopes = np.full(2, 1 / math.log(2)) if kind == "bits_per_byte" else np.array([before, after])
    slopes[0] *= -1
    se = math.sqrt(max(float(slopes @ covariance @ slopes), 0.0)) if math.isfinite(df) else math.inf
    rose, fell = int((d > TINY).sum()), int((d < -TINY).sum())
    p = 1.0 if rose == fell == 0 else p_value(sums, float(rates[1] - rates[0]), error, df)
    return Ratio(x.size, k, after - before, se, p, rose, fell, df, kind, rates, covariance, sums, sizes)


def _rates(losses: Floats, weights: Floats, cluster: NDArray[np.intp]) -> tuple[Floats, Floats, float]:
    """Quotients of sums of `losses` [m, items] and of weights; their jackknife covariance over clusters [m, m]; degrees of freedom."""
    k = int(cluster.max()) + 1
    sums, sizes = np.stack([np.bincount(cluster, row, k) for row in losses]), np.bincount(cluster, weights, k)
    total = float(sizes.sum())
    rates = sums.sum(1) / total
    effective = total**2 / float((sizes**2).sum())
    if effective < 1 + 1e-9:
        return rates, np.full((len(rates), len(rates)), math.inf), math.inf
    change = (sums - rates[:, None] * sizes) / (total - sizes)  # of the rate when a cluster is left out
    return rates, (k - 1) / k * change @ change.T, max(effective - 1, 1.0)


def _error_between(covariance: Floats) -> float:
    """Standard error of the difference of two rates."""
    if not math.isfinite(covariance[0, 0]):
        return math.inf
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return math.sqrt(variance) if variance > TINY**2 else 0.0


def _image(a: float, shift: float, ends: tuple[float, float], t: float, covariance: Floats) -> tuple[float, float]:
    """Range of exp(a + shift) - exp(a) where (shift, a) runs along the ellipse of radius t whose shifts reach `ends`."""
    if not all(map(math.isfinite, ends)):
        return -math.inf, math.inf
    angle = np.linspace(-np.pi, np.pi, 1025)  # 0 and +-pi are on the grid: where shifts end
    x, y = np.cos(angle), np.sin(angle)
    error = _error_between(covariance)
    along = float(covariance[0, 1] - covariance[0, 0]) / error if error else 0.0
    across = math.sqrt(max(float(covariance[0, 0]) - along**2, 0.0))
    shifts = shift + np.where(x >= 0, x * (ends[1] - shift), -x * (ends[0] - shift))
    starts = a + t * (along * x + across * y)
    values = np.exp(np.minimum(starts + shifts, _HIGHEST)) - np.exp(np.minimum(starts, _HIGHEST))
    return float(values.min()), float(values.max())


def _cluster_sums(d: Floats, cluster: NDArray[np.intp]) -> tuple[Floats, Floats]:
    return np.bincount(cluster, d).astype(np.float64), np.bincount(cluster).astype(np.float64)


def _signed(sums: Floats) -> Floats:
    """Sums under all 2^(k-1) patterns of signs; the first sign is fixed, since p depends on absolute values only."""
    totals = sums[:1]
    for s in sums[1:]:
        totals = np.concatenate((totals + s, totals - s))
    return totals


def holm(p: Sequence[float], alpha: float = 0.05) -> tuple[list[float], list[float]]:
    """Holm's step-down procedure.

    Returns:
        Adjusted p values, and for each hypothesis the level at which the procedure tested it: alpha/(m-r) at rank r while it
        rejects, and for the rest the level at which it stopped. An interval at that level excludes 0 exactly when the adjusted
        p is at most alpha.
    """
    m = len(p)
    adjusted, levels = [1.0] * m, [alpha] * m
    running, stopped = 0.0, None
    for rank, i in enumerate(sorted(range(m), key=lambda j: p[j])):
        running = max(running, min(1.0, (m - rank) * p[i]))
        adjusted[i] = running
        if stopped is None and running > alpha:
            stopped = alpha / (m - rank)
        levels[i] = stopped or alpha / (m - rank)
    return adjusted, levels


def resampled_means(values: Floats, cluster: NDArray[np.intp], *, seed: int, reps: int = 2000) -> Floats:
    """Means of `values` [configurations, items] under resampled clusters -> [configurations, reps].

    One draw serves all rows, so that ratios and differences between them stay paired. Seeded.
    """
    k = int(cluster.max()) + 1
    counts = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), reps).astype(np.float64)  # [reps, k]
    sums = np.stack([np.bincount(cluster, row, k) for row in np.atleast_2d(values)])
    return np.asarray(sums @ counts.T / (counts @ np.bincount(cluster, minlength=k)))


def expanded_tail(tail: float, clusters: float) -> float:
    """Tail of a percentile interval from `clusters` resampled clusters that is as wide as the t interval (Hesterberg 2015)."""
    from scipy.special import ndtr

    return float(ndtr(-math.sqrt(clusters / (clusters - 1)) * upper_t(tail, clusters - 1)))
