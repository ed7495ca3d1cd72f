"""Mask curves with intervals: how the loss of each function rises when the smallest neurons of every token are masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.emergent.labelled import Item
from workbench.emergent.sparsity import Indicator, MaskedLosses
from workbench.library.neurons_draws import ItemGroups
from workbench.scores.statistics import Floats, clustered_rates, codes, upper_t

TOLERANCE = 0.1
"""Rise of the loss in nats per token that counts as no loss."""


@dataclass(frozen=True)
class MaskPoint:
    """The loss with a share of the neurons masked.

    Attributes:
        percent: Share masked, in percent.
        loss: Mean loss per token, in nats.
        rise: Its rise over the unchanged model.
        low: Lower end of the rise's 95 % interval.
        high: Upper end.
    """

    percent: float
    loss: float
    rise: float
    low: float
    high: float


@dataclass(frozen=True)
class MaskCurve:
    """The losses of a function, or of all items, for all shares and one indicator.

    Attributes:
        function: The function; None for all items.
        indicator: Indicator that chooses the masked neurons.
        points: The losses, by ascending share.
        clusters: Number of clusters of the intervals.
        tolerance: Largest rise that counts as no loss.
    """

    function: str | None
    indicator: Indicator
    points: tuple[MaskPoint, ...]
    clusters: int
    tolerance: float

    @property
    def free(self) -> float:
        """Largest share, in percent, up to which no rise exceeds the tolerance."""
        return self._largest([point.rise for point in self.points])

    @property
    def surely_free(self) -> float:
        """Largest share, in percent, up to which no upper end of a rise exceeds the tolerance."""
        return self._largest([point.high for point in self.points])

    def _largest(self, rises: Sequence[float]) -> float:
        largest = 0.0
        for point, rise in zip(self.points, rises, strict=True):
            if rise > self.tolerance:
                break
            largest = point.percent
        return largest

    def document(self) -> dict[str, Any]:
        """Return the curve as plain data; infinite ends are None."""
        points = [
            {
                "percent": p.percent,
                "loss": p.loss,
                "rise": p.rise,
                "low": p.low if math.isfinite(p.low) else None,
                "high": p.high if math.isfinite(p.high) else None,
            }
            for p in self.points
        ]
        return {
            "function": self.function,
            "indicator": self.indicator,
            "points": points,
            "clusters": self.clusters,
            "tolerance": self.tolerance,
            "free": self.free,
            "surely_free": self.surely_free,
        }


def mask_curves(masked: MaskedLosses, items: Sequence[Item], tolerance: float = TOLERANCE) -> list[MaskCurve]:
    """Return the curves of all items and of each function, for both indicators.

    Intervals are rise ± t · jackknife error over tasks. Functions without a predicted token have no curve.

    Args:
        masked: Losses of the items.
        items: The items, in the same order.
        tolerance: Largest rise of the loss, in nats per token, that counts as no loss.
    """
    groups = ItemGroups.of(items)
    tokens = masked.tokens.numpy().astype(np.float64)
    curves = []
    for number, indicator in enumerate(masked.indicators):
        sums = masked.sums[number].numpy()
        for name, own in [
            (None, np.ones(len(items), bool)),
            *((f, groups.function == i) for i, f in enumerate(groups.functions)),
        ]:
            own = own & (tokens > 0)
            if not own.any():
                continue
            cluster = codes(groups.cluster[own].tolist())
            points = _points(masked.percents, sums[:, own], tokens[own], cluster)
            curves.append(MaskCurve(name, indicator, points, int(cluster.max()) + 1, tolerance))
    return curves


def _points(percents: Sequence[float], sums: Floats, tokens: Floats, cluster: Any) -> tuple[MaskPoint, ...]:
    rates, _, _ = clustered_rates(sums, tokens, cluster)
    points = []
    for percent, row, rate in zip(percents, sums, rates, strict=True):
        (rise,), covariance, df = clustered_rates((row - sums[0])[None], tokens, cluster)
        half = upper_t(0.025, df) * math.sqrt(covariance[0, 0]) if math.isfinite(df) else math.inf
        half = 0.0 if not percent else half
        points.append(MaskPoint(percent, float(rate), float(rise), float(rise) - half, float(rise) + half))
    return tuple(points)
