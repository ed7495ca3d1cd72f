"""Divide feed-forward neurons into experts, and measure what a token loses with some of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from workbench.activations.feedforward import feed_forward_layers, sample_feed_forward
from workbench.activations.labelled import Item, Labelled
from workbench.activations.losses import ItemLosses, losses
from workbench.activations.partition import Division, Partition, PartitionMethod, divide
from workbench.activations.selectors import (
    Selector,
    SelectorName,
    captured,
    centroids,
    dense_difference,
    oracle,
    ridges,
    selecting,
)
from workbench.ground.errors import UsageError
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Measured, Number
from workbench.neurons.damage import ItemGroups, loss_rise
from workbench.neurons.subject import Analysis, NeuronSubject, analyzed, some_of_each_task
from workbench.scores.statistics import codes
from workbench.weights.header import save_tensors

RECORD, FOLDER, TENSORS = "partition.json", "partition", "partition.safetensors"
USED = (75.0, 50.0, 25.0)


class PartitionSettings(JsonObject):
    """Settings of the partition."""

    method: PartitionMethod = "kmeans"
    """Method that divides the neurons."""
    experts: int = 16
    """Number of experts of a layer, shared ones included."""
    shared: int | None = None
    """Number of shared experts; null is the method's choice."""
    used: list[Number] = list(USED)
    """Shares of the experts that serve a token, in percent."""
    items: int = 2
    """Held-out items of each task whose loss is measured."""
    tokens: int = 2048
    """Tokens in the sample that divides neurons and fits selectors, and in the one that judges them."""
    seed: int = 0
    """Seed of samples and of the partition."""

    def counts(self) -> list[int]:
        """Return the numbers of experts of a token, largest first.

        Raises:
            WorkbenchError: If a share is not above 0 and up to 100 percent, or smaller than that of the shared experts.
        """
        if bad := [used for used in self.used if not 0 < used <= 100]:
            raise UsageError(f"expected shares of experts above 0 and up to 100 percent, found {bad[0]:g}")
        counts = sorted({max(1, round(used / 100 * self.experts)) for used in self.used}, reverse=True)
        if self.shared is not None and self.shared > counts[-1]:
            raise UsageError(
                f"{self.shared} shared experts are more than the {counts[-1]} of {self.experts} experts that serve a token at the "
                "smallest share",
                "Choose fewer shared experts, or larger shares.",
            )
        return counts


class SelectorPoint(JsonObject):
    """What is left with some experts of each token."""

    experts: int
    """Experts of a token, shared ones included."""
    used: Number
    """Their share of the neurons, in percent."""
    captured: Number
    """Share of the mass |activation| times norm of the output column that they have on held-out tokens, mean over layers."""
    loss: Number
    """Mean loss of held-out texts in nats per token."""
    rise: Number
    """Its rise over the dense model."""
    low: Measured
    """Lower end of the rise's 95 % interval over tasks."""
    high: Measured
    """Upper end."""


class SelectorCurve(JsonObject):
    """Losses of one selector."""

    selector: SelectorName
    """oracle, centroid or ridge."""
    points: list[SelectorPoint]
    """What is left, by descending number of experts. Numbers below that of the shared experts are left out."""


class PartitionResult(Analysis):
    """The neurons divided into experts, and what a token loses with some of them; the experts themselves are in partition/."""

    kind: str = "partition"
    """Kind of analysis."""
    settings: PartitionSettings
    """Option -> its value."""
    partition: str
    """Digest of the partition."""
    experts: int
    """Experts of a layer, shared ones included."""
    sizes: dict[str, int]
    """Layer -> neurons of an expert."""
    shared: dict[str, int]
    """Layer -> experts that serve every token."""
    difference: Number
    """Largest difference between the sum of all experts and the dense layer, relative to the layer's largest output."""
    loss: Number
    """Loss of the dense model on the held-out texts, in nats per token."""
    curves: list[SelectorCurve]
    """Loss against the share of the experts that serve a token, by selector."""


@dataclass(frozen=True)
class PartitionAnalysis:
    """A partition, and the losses with some of its experts.

    Attributes:
        result: The result.
        partition: The partition.
    """

    result: PartitionResult
    partition: Partition

    def write(self, out: Path) -> None:
        """Write partition.json, and the experts as partition/partition.safetensors.

        The tensor `experts.LAYER` holds the neurons of each expert [experts, size] int32, shared experts first.
        """
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        experts = {f"experts.{n}": of.experts.to(torch.int32) for n, of in self.partition.layers.items()}
        save_tensors(experts, out / FOLDER / TENSORS)
        self.result.write(out / RECORD)


def analyze_partition(subject: NeuronSubject, texts: Labelled, settings: PartitionSettings | None = None) -> PartitionAnalysis:
    """Divide the neurons of every layer on train items, and measure selectors on held-out items.

    Args:
        subject: The model.
        texts: The labelled texts.
        settings: The settings.

    Raises:
        WorkbenchError: If the model is a mixture already, the experts do not divide its neurons, or a share of experts is not between 0
            and 100 percent or smaller than that of the shared experts.
    """
    settings = settings or PartitionSettings()
    division = Division(settings.method, settings.experts, settings.shared, seed=settings.seed)
    division.check({site.layer: site.units for site in subject.sites if site.kind == "neurons"})
    counts = settings.counts()
    layers = feed_forward_layers(subject.model, subject.sites)
    items = some_of_each_task(texts.in_split("heldout"), settings.items)
    rows = subject.rows(items)
    fitted, judged = (
        sample_feed_forward(subject.model, layers, some, size=settings.tokens, seed=settings.seed)
        for some in (subject.rows(texts.in_split("train")), rows)
    )
    dense = losses(subject.model, rows)
    partition = divide(
        replace(division, most_shared=counts[0]),
        layers,
        fitted,
        progress=lambda done, total: subject.tell(done, total, "experts"),
    )
    curves = []
    selectors: tuple[Selector, ...] = (oracle(layers, partition), centroids(layers, partition), ridges(fitted, partition))
    for number, selector in enumerate(selectors):
        points = []
        for count in counts:
            if count >= max(partition.shared):
                with selecting(subject.model, layers, partition, selector, count):
                    selected = losses(subject.model, rows)
                mass = float(captured(judged, partition, selector, count).mean())
                points.append(_point(count, settings.experts, mass, selected, dense, items))
        curves.append(SelectorCurve(selector=selector.name, points=points))
        subject.tell(number + 1, len(selectors), f"selector {selector.name}")
    result = PartitionResult(
        model=subject.name,
        digest=subject.digest,
        data=analyzed(texts, len(items), judged.tokens),
        settings=settings,
        partition=partition.digest(),
        experts=partition.experts,
        sizes={str(number): of.experts.shape[1] for number, of in partition.layers.items()},
        shared={str(number): of.shared for number, of in partition.layers.items()},
        difference=dense_difference(judged, partition),
        loss=dense.mean,
        curves=curves,
    )
    return PartitionAnalysis(result, partition)


def _point(
    count: int, experts: int, mass: float, selected: ItemLosses, dense: ItemLosses, items: Sequence[Item]
) -> SelectorPoint:
    """Return a point with the interval of the rise over tasks."""
    tokens = dense.tokens.numpy().astype(np.float64)
    counted = tokens > 0
    cluster = codes(ItemGroups.of(items).cluster[counted])
    rise, low, high = loss_rise(selected.sums.numpy()[counted], dense.sums.numpy()[counted], tokens[counted], cluster)
    return SelectorPoint(
        experts=count, used=100 * count / experts, captured=mass, loss=selected.mean, rise=rise, low=low, high=high
    )
