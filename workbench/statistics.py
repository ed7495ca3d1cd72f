"""Statistics of scores on the same items: paired, clustered, corrected for the size of the family.

Items that share a cluster (a template, a passage) are not independent, so every standard error, test and resampling works on
clusters. Sources: Miller 2024, arXiv 2411.00640 (paired differences, clustered standard errors); Holm 1979; Wilson 1927;
Newcombe 1998 (square-and-add intervals); sign-flip tests and their inversion, Pitman 1937.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEW_CLUSTERS = 8  # below this no verdict is given
T_CLUSTERS = 20  # from here on the cluster-robust t is used; below it, exact sign flips
_TINY = 1e-12


def _t(tail: float, df: int) -> float:
    """Upper quantile of Student's t."""
    from scipy.special import stdtrit

    return float(-stdtrit(max(df, 1), tail))


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
    t, se = _t(alpha / 2, k - 1), clustered_se(values, cluster)
    if not np.isin(values, (0.0, 1.0)).all():
        low, high = mean - t * se, mean + t * se
        return (max(low, 0.0), min(high, 1.0)) if inside else (low, high)
    spread = mean * (1 - mean)
    effective = n / max(1.0, se**2 * n / spread) if spread > _TINY else n
    share = effective + t**2
    centre = (mean * effective + t**2 / 2) / share
    half = t * math.sqrt(spread * effective + t**2 / 4) / share
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """Mean difference b - a over paired items, its test and its intervals.

    The test is the cluster-robust t with k-1 degrees of freedom from 20 clusters on, and the exact sign-flip test over all 2^k signs
    of the cluster sums below. `interval(level)` inverts the same test: it excludes 0 exactly when p <= level.

    Attributes:
        se: Cluster-robust standard error; 0 if no item changed, or all clusters changed alike.
        p: Two-sided, of "no difference".
        wins, losses: Items that got better, worse.
    """

    n: int
    clusters: int
    diff: float
    se: float
    p: float
    wins: int
    losses: int
    _a: Floats = field(repr=False)
    _b: Floats = field(repr=False)
    _cluster: NDArray[np.intp] = field(repr=False)

    @property
    def unchanged(self) -> bool:
        """No item has another score."""
        return self.wins == self.losses == 0

    @property
    def bounded(self) -> bool:
        """Both scores lie in [0, 1], so the difference lies in [-1, 1]."""
        return bool(min(self._a.min(), self._b.min()) >= 0 and max(self._a.max(), self._b.max()) <= 1)

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Two-sided interval of confidence 1 - level."""
        if self.unchanged:
            return 0.0, 0.0
        if self.se < _TINY:
            low, high = self._square_and_add(level)
        elif self.clusters < T_CLUSTERS:
            low, high = self._inverted(level)
        else:
            half = _t(level / 2, self.clusters - 1) * self.se
            low, high = self.diff - half, self.diff + half
        return (max(low, -1.0), min(high, 1.0)) if self.bounded else (low, high)

    def mde(self, level: float = 0.05, power: float = 0.8) -> float | None:
        """Smallest true difference that a test at this level finds with this power; None if no spread was seen."""
        if not _TINY < self.se < math.inf:
            return None
        return (_t(level / 2, self.clusters - 1) + _t(1 - power, 10**6)) * self.se

    def needs(self, effect: float, level: float = 0.05, power: float = 0.8) -> int | None:
        """Items, about, at which a difference of this size would be found; at least as many as make 20 clusters."""
        smallest = self.mde(level, power)
        if smallest is None or effect <= 0:
            return None
        return max(math.ceil(self.n * (smallest / effect) ** 2), math.ceil(self.n * T_CLUSTERS / self.clusters))

    def _inverted(self, level: float) -> tuple[float, float]:
        """Sign-flip interval: for each sign pattern, the shifts that it does not contradict end at a known point."""
        sums, sizes = _cluster_sums(self._b - self._a, self._cluster)
        flipped, weight = _signed(sums), _signed(sizes)
        plus = (sums.sum() + flipped) / np.maximum(self.n + weight, _TINY)
        rest = self.n - weight
        with np.errstate(divide="ignore", invalid="ignore"):
            minus = (sums.sum() - flipped) / rest
        never = rest < _TINY  # the pattern of equal signs fits every shift
        upper = np.sort(np.where(never, math.inf, np.maximum(plus, minus)))[::-1]
        lower = np.sort(np.where(never, -math.inf, np.minimum(plus, minus)))
        spare = math.floor(level * upper.size + 1e-9)
        return float(lower[spare]), float(upper[spare])

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
    wins, losses = int((d > _TINY).sum()), int((d < -_TINY).sum())
    if wins == losses == 0:
        p = 1.0
    elif k < T_CLUSTERS:
        total = np.abs(_signed(_cluster_sums(d, label)[0]))
        p = float((total >= abs(d.sum()) - 1e-9).mean())
    elif se < _TINY:
        p = 2.0 ** (1 - k)  # all clusters alike: only the sign-flip test has something to say
    else:
        from scipy.special import stdtr

        p = float(2 * stdtr(k - 1, -abs(d.mean()) / se))
    return Paired(x.size, k, float(d.mean()), se, p, wins, losses, x, y, label)


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
