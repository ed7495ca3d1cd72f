"""How many neurons a token uses, and how the loss rises when the smallest neurons of each token are masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workbench.activations.labelled import Item, ItemRow, Labelled
from workbench.activations.losses import losses
from workbench.activations.sites import Progress, Site, Visitor, visiting
from workbench.ground.errors import UsageError
from workbench.ground.files import write_text
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Measured, Number
from workbench.ground.tables import csv_records
from workbench.neurons.damage import ItemGroups, loss_rise
from workbench.neurons.sparsity import (
    INDICATORS,
    Distribution,
    Indicator,
    TruncationError,
    distribution,
    token_sample,
    truncation_error,
)
from workbench.neurons.subject import Analysis, NeuronSubject, analyzed, some_of_each_task
from workbench.scores.statistics import Floats, clustered_rates, codes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

RECORD = "sparsity.json"
PERCENTS = (0.0, 30.0, 50.0, 60.0, 70.0, 80.0, 90.0)
ERROR = 0.2
"""Cumulative error of tail truncation that no layer may exceed."""
TOLERANCE = 0.1
"""Rise of the loss in nats per token that counts as no loss."""


class MaskPoint(JsonObject):
    """The loss with a share of the neurons masked."""

    percent: Number
    """Share masked, in percent."""
    loss: Number
    """Mean loss in nats per token."""
    rise: Number
    """Its rise over the unchanged model."""
    low: Measured
    """Lower end of the rise's 95 % interval."""
    high: Measured
    """Upper end."""


class MaskCurve(JsonObject):
    """Losses of a function for all shares."""

    function: str | None
    """The function; null for all texts."""
    indicator: Indicator
    """Indicator that chooses the masked neurons."""
    points: list[MaskPoint]
    """The losses."""
    clusters: int
    """Clusters of the intervals."""
    tolerance: Number
    """Rise in nats that counts as no loss."""
    free: Number
    """Largest share, in percent, without a loss."""
    surely_free: Number
    """Largest share whose interval excludes a loss."""


class SparsityResult(Analysis):
    """How many neurons a token uses, and what masking the others costs."""

    kind: str = "sparsity"
    """Kind of analysis."""
    distributions: list[Distribution]
    """Distribution of each indicator."""
    curves: list[MaskCurve]
    """Loss against the share masked, by function and indicator."""
    cett: TruncationError
    """Thresholds of equal truncation error."""

    def save(self, out: Path) -> None:
        """Write sparsity.json and the curves as masking.csv."""
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"function": curve.function or "all", "indicator": curve.indicator, **point.to_dict()}
            for curve in self.curves
            for point in curve.points
        ]
        write_text(out / "masking.csv", csv_records(rows))
        self.write(out / RECORD)


@dataclass(frozen=True)
class MaskedLosses:
    """Losses of items when the neurons with the lowest indicator of each token and layer are set to zero.

    Attributes:
        percents: Share of the neurons that is masked, in percent, ascending from 0.
        sums: Indicator -> sum of −log p of each item [percents, items] float64.
        tokens: Number of predicted tokens of each item [items].
    """

    percents: tuple[float, ...]
    sums: dict[Indicator, Tensor]
    tokens: Tensor


def masked_losses(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    *,
    percents: Sequence[float] = PERCENTS,
    progress: Progress = lambda *_: None,
) -> MaskedLosses:
    """Compute the loss of every item with the lowest share of the neurons masked, for several shares and both indicators.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        percents: Shares to mask, in percent. 0 is added if it is missing: it is the unchanged model, computed once for all indicators.
        progress: Progress callback; it counts passes over the items.

    Raises:
        WorkbenchError: If a share is not between 0 and 100.
    """
    shares = sorted({0.0, *map(float, percents)})
    if bad := [share for share in shares if not 0 <= share <= 100]:
        raise UsageError(f"expected shares to mask between 0 and 100 percent, found {bad[0]:g}")
    total = 1 + len(INDICATORS) * (len(shares) - 1)
    base = losses(model, rows)
    progress(1, total)
    sums: dict[Indicator, Tensor] = {}
    for i, indicator in enumerate(INDICATORS):
        masked = [base.sums]
        for j, share in enumerate(shares[1:]):
            with visiting(model, sites, masking(sites, indicator, share)):
                masked.append(losses(model, rows).sums)
            progress(2 + i * (len(shares) - 1) + j, total)
        sums[indicator] = torch.stack(masked)
    return MaskedLosses(tuple(shares), sums, base.tokens)


def masking(sites: Sequence[Site], indicator: Indicator, percent: float) -> Visitor:
    """Return a visitor that sets the neurons with the lowest indicator of each token to zero.

    Args:
        sites: The sites.
        indicator: The indicator.
        percent: Share of the neurons of each layer to mask. If it rounds to no neuron, activations stay unchanged.
    """
    norms: dict[int, Tensor] = {}  # of the output columns of each site, computed once

    def visit(number: int, activations: Tensor) -> Tensor | None:
        count = round(percent / 100 * activations.shape[-1])
        if not count:
            return None
        size = activations.float().abs()
        if indicator == "magnitude":
            if number not in norms:
                norms[number] = sites[number].norms().to(size.device)
            size = size * norms[number]
        lowest = size.topk(count, dim=-1, largest=False, sorted=False).indices
        return activations.scatter(-1, lowest, 0.0)

    return visit


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
    members = [(None, np.ones(len(items), bool)), *((f, groups.function == i) for i, f in enumerate(groups.functions))]
    curves = []
    for indicator, sums in masked.sums.items():
        for name, member in members:
            own = member & (tokens > 0)
            if own.any():
                cluster = codes(groups.cluster[own])
                curves.append(_curve(name, indicator, masked.percents, sums.numpy()[:, own], tokens[own], cluster, tolerance))
    return curves


def _curve(
    name: str | None,
    indicator: Indicator,
    percents: Sequence[float],
    sums: Floats,
    tokens: Floats,
    cluster: np.ndarray,
    tolerance: float,
) -> MaskCurve:
    rates, _, _ = clustered_rates(sums, tokens, cluster)
    measured = [
        (percent, float(rate), *(loss_rise(row, sums[0], tokens, cluster) if percent else (0.0, 0.0, 0.0)))
        for percent, row, rate in zip(percents, sums, rates, strict=True)
    ]

    def largest(exceeds: Callable[[float, float], bool]) -> float:
        """Return the largest share up to which no point exceeds the tolerance."""
        share = 0.0
        for percent, _, rise, _, high in measured:
            if exceeds(rise, high):
                break
            share = percent
        return share

    return MaskCurve(
        function=name,
        indicator=indicator,
        points=[MaskPoint(percent=p, loss=loss, rise=rise, low=low, high=high) for p, loss, rise, low, high in measured],
        clusters=int(cluster.max()) + 1,
        tolerance=tolerance,
        free=largest(lambda rise, _: rise > tolerance),
        surely_free=largest(lambda _, high: high > tolerance),
    )


def analyze_sparsity(subject: NeuronSubject, texts: Labelled) -> SparsityResult:
    """Measure the distribution of both indicators on a sample of tokens, and the loss of held-out items with neurons masked.

    Args:
        subject: The model.
        texts: The labelled texts.

    Raises:
        WorkbenchError: If no item has a token whose loss counts.
    """
    items = some_of_each_task(texts.in_split("heldout"))
    rows = subject.rows(items)
    masked = masked_losses(
        subject.model,
        subject.sites,
        rows,
        progress=lambda done, total: subject.tell(done, total, "masking"),
    )
    sample = token_sample(subject.model, subject.sites, rows)
    return SparsityResult(
        model=subject.name,
        digest=subject.digest,
        data=analyzed(texts, len(items)),
        distributions=[distribution(sample, indicator) for indicator in INDICATORS],
        curves=mask_curves(masked, items),
        cett=truncation_error(sample, ERROR),
    )
