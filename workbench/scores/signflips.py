"""Sign-flip tests: the distribution of a mean difference if there is no true difference, and what skewness leaves of them.

If two configurations are equally good, each cluster's sum of differences is positive as often as negative. Flipping the signs of clusters
therefore gives the distribution of the mean under "no difference", for any cluster sizes (Pitman 1937). Configurations scored on the same
items are flipped together, so that a family of many similar ones costs little power: each row must exceed the largest statistic of all rows
under the patterns of signs (step-down max-T, Westfall and Young 1993).

Scores are discrete, so p values are mid-p: a pattern that gives exactly the observed value counts half (Lancaster 1961).

They hold where differences are symmetric about 0. `unseen_p` adds one cluster that was not drawn and that changed the other way (Gaffke
2005); `skew_p` corrects Student's t for the skewness that the sample shows (Hall 1992). `unseen` says when they count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP, _POINTS = 0.12, 150  # of the quadrature, whose integrand falls at least like e^-u; its error is below 1e-7
_MOST_TIMES = 1024.0  # beyond this multiple of the data, no number of clusters is named


def unseen_p(sums: Floats, size: float, times: float = 1.0) -> float:
    """Return the p of "the mean is at most 0" with one unseen cluster of sum `-size`.

    It is the probability that sum(sums * g) is at most size * g0 for independent exponential g and g0 (Gaffke 2005; Learned-Miller and Thomas
    2019, arXiv 1905.06208, who conjecture that it is at most the level for every distribution bounded by `size`). For sums that are all 1 or -1
    and size 1 it is the sign test; for equal sums x it is (size / (size + x))^k, the rule of three.

    The probability is the inverse Laplace transform of the sum's moment generating function, along the line through the saddle point: it has
    no random part.

    Args:
        sums: Sums by cluster [k], positive in the direction of the claim.
        size: Size of the sum that the unseen cluster has in the other direction; above 0.
        times: Each cluster counts this many times.
    """
    scale = max(float(np.abs(sums).max()), size)
    values, often = np.unique(sums / scale, return_counts=True)
    values, counts = np.append(values, -size / scale), np.append(often * times, 1.0)
    kept = np.abs(values) > TINY
    values, counts = values[kept], counts[kept]
    if values.max() <= 0:
        return 1.0
    saddle = _saddle(values, counts)
    width = 1 / math.sqrt(float((counts * (values / (1 - saddle * values)) ** 2).sum()) + 1 / saddle**2)
    u = _STEP * (np.arange(_POINTS) + 0.5)  # the midpoint rule; the other half of the line is its mirror image
    s = saddle + 1j * width * np.sinh(u)
    integrand = np.exp(-_logs(s, values, counts) - np.log(-s)).real * width * np.cosh(u)
    return float(min(max(integrand.sum() * _STEP / math.pi, 0.0), 1.0))


def _logs(s: Complexes, values: Floats, counts: Floats) -> Complexes:
    """Return the sums of counts * log(1 - s * values), up to multiples of 2 pi i where counts are 1: eight of these values take one logarithm."""
    single = counts == 1
    eights = np.zeros((8, -(-int(single.sum()) // 8)))
    eights.ravel()[: int(single.sum())] = values[single]
    product = 1 - s[:, None] * eights[0]
    for row in eights[1:]:
        product *= 1 - s[:, None] * row
    logs: Complexes = np.log(product).sum(1) + np.log(1 - s[:, None] * values[~single]) @ counts[~single]
    return logs


def _saddle(values: Floats, counts: Floats) -> float:
    """Return about the s < 0 at which -sum(counts * log(1 - s * values)) - log(-s), which is convex, is smallest."""
    low, high = 1 / float(values.min()), 0.0  # the function is infinite at both ends
    s = low / 2
    for _ in range(40):
        rates = values / (1 - s * values)
        slope, curvature = float(counts @ rates) - 1 / s, float(counts @ rates**2) + 1 / s**2
        low, high = (low, s) if slope > 0 else (s, high)
        step = slope / curvature  # Newton's; where it leaves the bounds, they are halved
        last, s = s, s - step if low < s - step < high else (low + high) / 2
        if abs(s - last) < 1e-6 * abs(s):
            break
    return s


_STEPS = np.linspace(-4, 3, 141)
_NODES = np.exp(np.pi / 2 * np.sinh(_STEPS))
_WEIGHTS = _NODES * np.cosh(_STEPS) * (_STEPS[1] - _STEPS[0]) * np.pi / 2


@np.errstate(over="ignore")
def beyond(u: float, df: float) -> float:
    """Return the integral of cosh^-df from u on, times √df, by exp-sinh quadrature. Student's t has this density at √df sinh(u)."""
    return float(_WEIGHTS @ np.exp(-df / 2 * np.log1p(np.sinh(u + _NODES / math.sqrt(df)) ** 2)))


def t_tail(t: float, df: float) -> float:
    """Return the probability that Student's t exceeds `t` >= 0, to 12 digits. scipy.special takes a quarter of a comparison to import."""
    return beyond(math.asinh(t / math.sqrt(df)), df) / beyond(0.0, df) / 2


def skew_p(sums: Floats, sizes: Floats, times: float = 1.0) -> float:
    """Return the two-sided p of Student's t corrected for the skewness of the clusters by Hall's cubic transformation.

    It is 0 if all clusters changed by the same rate, which shows no spread, and 1 if the correction turns the sign.

    Args:
        sums: Sums of differences by cluster [k].
        sizes: Sizes of the clusters [k].
        times: Each cluster counts this many times.

    Source:
        Hall 1992, On the removal of skewness by transformation, Journal of the Royal Statistical Society B 54.
    """
    mean = float(sums.sum() / sizes.sum())
    rest = sums - mean * sizes
    squares = float(rest @ rest) * times
    if squares <= TINY * float(np.abs(sums).max()) ** 2:
        return 0.0
    effective = float(sizes.sum()) ** 2 / float(sizes @ sizes) * times
    t = mean * float(sizes.sum()) * times / math.sqrt(squares * effective / max(effective - 1, TINY))
    skew = float((rest**3).sum()) * times / squares**1.5  # the skewness divided by the root of the number of clusters
    corrected = t + skew * (1 + 2 * t * t) / 6 + skew * skew * t**3 / 27
    return 2 * t_tail(abs(corrected), max(effective - 1, 1.0)) if corrected * t > 0 else 1.0


def times_needed(p: Callable[[float], float], level: float) -> float | None:
    """Return how many times as many clusters of the same kind bring a p, a function of that multiple, to a level; None if none do."""
    if p(_MOST_TIMES) > level:
        return None
    low, high = 1.0, _MOST_TIMES
    while high - low > 0.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if p(middle) <= level else (middle, high)
    return high


Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]
Singles = NDArray[np.float32]
Signs = NDArray[np.int8]

TINY = 1e-12
PATTERNS = 10_000
"""Number of random patterns of signs if there are too many to use all."""
_ALL_UP_TO = 14  # up to this number of clusters all patterns are used: 2^13, with the first sign fixed
_KEPT_UP_TO = 2048  # up to this number of clusters the patterns stay in memory, one byte per sign
_PACKED_UP_TO = 1 << 27  # bytes of patterns of more clusters that stay in memory, eight signs a byte: those of 107,000 clusters
_PACKED: dict[int, list[NDArray[np.uint8]]] = {}
_CHUNK = 1 << 24  # signs per chunk
_CLOSE = 1e-5  # relative to the sum of absolute values: closer values count as equal in single precision


def flipped(sums: Floats) -> Singles:
    """Return sums over clusters under patterns of signs.

    The first pattern flips nothing. Up to 14 clusters all patterns are used, with the sign of the first cluster fixed because tests use only
    absolute values; with more clusters 10,000 seeded patterns, the same for all tasks with this number of clusters.

    Args:
        sums: [clusters, rows].

    Returns:
        [patterns, rows].
    """
    table = np.asarray(sums, np.float32)
    return np.concatenate([signs.astype(np.float32) @ table for signs in _patterns(len(table))])


def tails(sums: Floats) -> Floats:
    """Return the two-sided mid-p [rows] of differences that are symmetric about 0, from their sums by cluster [clusters, rows]."""
    total = np.abs(sums).sum(0)
    drawn, observed, close = np.abs(flipped(sums)), np.abs(sums.sum(0)), _CLOSE * total
    p = ((drawn > observed + close).mean(0) + (drawn >= observed - close).mean(0)) / 2
    return np.where(np.abs(sums).max(0) > TINY, p, 1.0)  # 1 if items changed but no cluster's sum did


@dataclass(frozen=True)
class StepDown:
    """The result of a family's step-down test for one row.

    Attributes:
        p: Adjusted mid-p.
        critical: Value that the row's statistic must reach at its step.
        first: That value at the first step, which holds for all rows together.
        least: Adjusted p that the row would have if all its clusters had changed in the same direction; if it is above the level, the row
            cannot be significant.
        single: Mid-p of `first` for this row alone.
    """

    p: float
    critical: float
    first: float
    least: float
    single: float


def step_down(tasks: Sequence[tuple[Floats, Floats]], alpha: float) -> list[list[StepDown]]:
    """Test all rows of a family step by step, the most significant row first.

    Rows of one task are flipped together and compared with the largest statistic of the remaining rows (max-T). Tasks are independent, and
    the smallest of their p values is corrected for the number of tasks (Sidak), because statistics over different clusters are not
    comparable. The probability of any false rejection is at most `alpha`, whichever rows are truly zero.

    Args:
        tasks: For each task the sums [clusters, rows] and the rows' scales [rows]; a row's statistic is |sum| / scale.
        alpha: Error rate of the family.

    Returns:
        One result per row, in the order of `tasks`. Rows that are not rejected have the critical value of the first step, which holds for
        all rows together.
    """
    results = [[StepDown(1.0, math.inf, math.inf, 1.0, 0.0)] * len(scales) for _, scales in tasks]
    task_of = [t for t, (_, scales) in enumerate(tasks) if len(scales)]
    ladders = [_Ladder(*tasks[t], _one_of(alpha, len(task_of))) for t in task_of]
    running = 0.0
    while remaining := [i for i, ladder in enumerate(ladders) if ladder.remaining]:
        i = min(remaining, key=lambda i: ladders[i].p)
        ladder, count = ladders[i], len(remaining)
        running = max(running, _any_of(ladder.p, count))
        critical = ladder.critical(_one_of(alpha, count)) if running <= alpha else ladder.first
        least = _any_of(ladder.least, count)
        results[task_of[i]][ladder.row] = StepDown(running, critical, ladder.first, least, float(ladder.single[ladder.row]))
        ladder.pop()
    return results


def _any_of(p: float, tasks: int) -> float:
    """Return the probability that at least one of some independent p values is at most `p`."""
    return float(-math.expm1(tasks * math.log1p(-p)))


def _one_of(alpha: float, tasks: int) -> float:
    """Return the level for each of some independent p values at which the probability of any rejection is alpha."""
    return float(-math.expm1(math.log1p(-alpha) / tasks))


class _Ladder:
    """The rows of a task in the order of their statistic, and the largest statistic of the remaining rows under sign flips."""

    def __init__(self, sums: Floats, scales: Floats, alpha: float) -> None:
        self._observed = np.abs(sums.sum(0)) / scales
        self._most = np.abs(sums).sum(0) / scales
        self._order = [int(r) for r in np.argsort(self._observed, kind="stable")]
        drawn = (np.abs(flipped(sums)) / scales).astype(np.float32)
        self._largest = np.maximum.accumulate(drawn[:, self._order], axis=1)  # [patterns, rows], row by row from the smallest
        self._p: float | None = None
        self.first = self.critical(alpha)
        self.single = _above(drawn, self.first)

    @property
    def remaining(self) -> int:
        """Number of remaining rows."""
        return len(self._order)

    @property
    def row(self) -> int:
        """Index of the remaining row with the largest statistic."""
        return self._order[-1]

    @property
    def p(self) -> float:
        """Mid-p of that row: how often the largest statistic exceeds the row's own, with ties counted half."""
        if self._p is None:
            self._p = self._above(float(self._observed[self.row]))
        return self._p

    @property
    def least(self) -> float:
        """The p that this row would have if all its clusters had changed in the same direction."""
        return self._above(float(self._most[self.row]))

    def pop(self) -> None:
        """Remove that row."""
        self._order.pop()
        self._p = None

    def critical(self, alpha: float) -> float:
        """Return the smallest value of the largest statistic with at most `alpha` of its distribution above; infinite if there is none.

        The distribution is discrete: between two of its values, the upper one is returned.
        """
        values, counts = np.unique(self._largest[:, self.remaining - 1], return_counts=True)
        above = np.cumsum(counts[::-1])[::-1] - counts / 2
        index = int(np.searchsorted(-above / counts.sum(), -alpha, "left"))
        return float(values[index]) if index < len(values) else math.inf

    def _above(self, z: float) -> float:
        return float(_above(self._largest[:, self.remaining - 1], z))


def _above(drawn: Singles, z: float) -> Any:
    """Return the mid-p of a value, or of each row's, among drawn ones [patterns] or [patterns, rows]."""
    close = _CLOSE * (1 + z)
    return ((drawn > z + close).mean(0) + (drawn >= z - close).mean(0)) / 2


def _patterns(clusters: int) -> Iterator[Signs]:
    """Yield patterns of signs [patterns, clusters], chunk by chunk."""
    if clusters > _KEPT_UP_TO:
        yield from _random_patterns(clusters)
    else:
        patterns, rows = _cached_patterns(clusters), max(1, _CHUNK // clusters)
        yield from (patterns[start : start + rows] for start in range(0, len(patterns), rows))


@lru_cache(maxsize=8)
def _cached_patterns(clusters: int) -> Signs:
    if clusters > _ALL_UP_TO:
        return np.concatenate(list(_random_patterns(clusters)))
    bits = np.arange(1 << max(clusters - 1, 0))[:, None] >> np.arange(clusters)[None, ::-1] & 1
    return (1 - 2 * bits).astype(np.int8)


def _random_patterns(clusters: int) -> Iterator[Signs]:
    """Yield the seeded patterns of a number of clusters; as bits they stay in memory, those of the latest numbers of clusters."""
    drawn = _PACKED.pop(clusters, None)
    kept = drawn or []
    rng, rows = np.random.default_rng(clusters), max(1, _CHUNK // clusters)
    for chunk, start in enumerate(range(0, PATTERNS, rows)):
        if drawn:
            bits = np.unpackbits(drawn[chunk], axis=1, count=clusters).view(np.int8)
        else:
            bits = rng.integers(0, 2, (min(rows, PATTERNS - start), clusters), np.int8)
            if start == 0:
                bits[0] = 0
            if PATTERNS * clusters <= 8 * _PACKED_UP_TO:
                kept.append(np.packbits(bits.view(np.uint8), axis=1))
        yield 1 - 2 * bits
    if kept:
        _PACKED[clusters] = kept
    while sum(bits.nbytes for chunks in _PACKED.values() for bits in chunks) > _PACKED_UP_TO:
        del _PACKED[next(iter(_PACKED))]
