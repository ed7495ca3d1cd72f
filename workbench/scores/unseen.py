"""What the sample cannot show: a bound that counts one unseen cluster, and a test that corrects for skewness.

Sign flips hold where differences are symmetric about 0. If a few clusters gain much and all others lose a little, a sample often contains no
gaining cluster: it then shows no skewness, and no resampling can know of it. What helps is the range of the metric. `unseen_p` adds one cluster
that was not drawn and that changed the other way by as much as is plausible (Gaffke 2005). Metrics without a range have no such cluster;
`skew_p` corrects Student's t for the skewness that the sample shows (Hall 1992), which is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from workbench.scores.signflips import TINY, Floats

_STEP, _POINTS = 0.1, 220  # of the quadrature, whose integrand falls at least like e^-u; its error is below 1e-8
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
    integrand = np.exp(-(np.log(1 - s[:, None] * values) @ counts) - np.log(-s)).real * width * np.cosh(u)
    return float(min(max(integrand.sum() * _STEP / math.pi, 0.0), 1.0))


def _saddle(values: Floats, counts: Floats) -> float:
    """Return about the s < 0 at which -sum(counts * log(1 - s * values)) - log(-s), which is convex, is smallest."""
    low, high = 1 / float(values.min()), 0.0  # the function is infinite at both ends
    for _ in range(40):
        s = (low + high) / 2
        slope = float((counts * values / (1 - s * values)).sum()) - 1 / s
        low, high = (low, s) if slope > 0 else (s, high)
    return (low + high) / 2


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
    from scipy.special import stdtr

    mean = float(sums.sum() / sizes.sum())
    rest = sums - mean * sizes
    squares = float(rest @ rest) * times
    if squares <= TINY * float(np.abs(sums).max()) ** 2:
        return 0.0
    effective = float(sizes.sum()) ** 2 / float(sizes @ sizes) * times
    t = mean * float(sizes.sum()) * times / math.sqrt(squares * effective / max(effective - 1, TINY))
    skew = float((rest**3).sum()) * times / squares**1.5  # the skewness divided by the root of the number of clusters
    corrected = t + skew * (1 + 2 * t * t) / 6 + skew * skew * t**3 / 27
    return float(2 * stdtr(max(effective - 1, 1.0), -abs(corrected))) if corrected * t > 0 else 1.0


def times_needed(p: Callable[[float], float], level: float) -> float | None:
    """Return how many times as many clusters of the same kind bring a p, a function of that multiple, to a level; None if none do."""
    if p(_MOST_TIMES) > level:
        return None
    low, high = 1.0, _MOST_TIMES
    while high - low > 0.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if p(middle) <= level else (middle, high)
    return high
