"""`analyze partition`: divide feed-forward neurons into experts, and measure what a token loses with some of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.emergent.feedforward import FeedForward, FeedForwardSample, feed_forward_layers, sample_feed_forward
from workbench.emergent.labelled import Item, ItemRow, Labelled
from workbench.emergent.losses import ItemLosses, losses
from workbench.emergent.partition import Division, Partition, PartitionMethod, divide
from workbench.emergent.partition_files import write_partition
from workbench.emergent.selectors import (
    Selector,
    SelectorName,
    captured,
    centroids,
    dense_difference,
    mlps,
    oracle,
    representatives,
    ridges,
    selecting,
)
from workbench.errors import UsageError
from workbench.files import write_json
from workbench.library.neurons_draws import ItemGroups
from workbench.library.neurons_sparsity import some_of_each_task
from workbench.library.neurons_subject import NeuronSubject
from workbench.scores.statistics import clustered_rates, codes, upper_t

RECORD, FOLDER = "partition.json", "partition"
USED = (75.0, 50.0, 25.0)
SELECTORS: tuple[SelectorName, ...] = ("oracle", "centroid", "representative", "ridge", "mlp")


@dataclass(frozen=True)
class PartitionOptions:
    """Settings of the partition and of its measurement; part of the record.

    Attributes:
        method: Method that divides the neurons.
        experts: Number of experts of a layer, shared ones included.
        shared: Number of shared experts; None is the method's choice.
        used: Shares of the experts that serve a token, in percent.
        selectors: Selectors to measure. `representative` is left out where the method names no such neurons.
        items: Held-out items of each task whose loss is measured.
        tokens: Tokens in the sample that divides neurons and fits selectors, and in the one that judges them.
        seed: Seed of samples and of the partition.
    """

    method: PartitionMethod = "kmeans"
    experts: int = 16
    shared: int | None = None
    used: tuple[float, ...] = USED
    selectors: tuple[SelectorName, ...] = SELECTORS
    items: int = 2
    tokens: int = 2048
    seed: int = 0

    def counts(self) -> list[int]:
        """Return the numbers of experts of a token, largest first.

        Raises:
            WorkbenchError: If a share is not above 0 and up to 100 percent, or smaller than that of the shared experts.
        """
        if bad := [used for used in self.used if not 0 < used <= 100]:
            raise UsageError(f"expected shares of experts above 0 and up to 100 percent, found {bad[0]:g}")
        counts = sorted({max(1, round(used / 100 * self.experts)) for used in self.used}, reverse=True)
        if not counts:
            raise UsageError("expected at least one share of experts, found none")
        if self.shared is not None and self.shared > counts[-1]:
            raise UsageError(
                f"{self.shared} shared experts are more than the {counts[-1]} of {self.experts} experts that serve a token at the "
                "smallest share",
                "Choose fewer shared experts, or larger shares.",
            )
        return counts


@dataclass(frozen=True)
class SelectorPoint:
    """What is left with some experts of each token.

    Attributes:
        experts: Number of experts of a token, shared ones included.
        used: Their share of the neurons, in percent.
        captured: Share of the mass that they have on held-out tokens, mean over layers.
        loss: Mean loss of held-out items per token, in nats.
        rise: Its rise over the dense model.
        low: Lower end of the rise's 95 % interval over tasks.
        high: Upper end.
    """

    experts: int
    used: float
    captured: float
    loss: float
    rise: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        """Return the point as plain data; infinite ends are None."""
        ends = {name: value if math.isfinite(value) else None for name, value in (("low", self.low), ("high", self.high))}
        return {**asdict(self), **ends}


@dataclass(frozen=True)
class PartitionAnalysis:
    """A partition, and the losses with some of its experts.

    Attributes:
        model: Name of the model.
        file: File of labelled texts, as the user named it.
        data: The texts.
        items: Number of items whose loss was measured.
        tokens: Number of tokens that chose the partition, and of those that judged it.
        partition: The partition.
        difference: Largest difference between the sum of all experts and the dense layer, relative to its largest output.
        loss: Loss of the dense model per token, in nats.
        curves: Selector -> its points, by descending number of experts.
        options: The settings.
    """

    model: str
    file: str
    data: Labelled
    items: int
    tokens: tuple[int, int]
    partition: Partition
    difference: float
    loss: float
    curves: dict[str, tuple[SelectorPoint, ...]]
    options: PartitionOptions

    def document(self) -> dict[str, Any]:
        """Return the analysis as plain data."""
        sizes = {str(number): of.experts.shape[1] for number, of in self.partition.layers.items()}
        return {
            "version": 1,
            "kind": "partition",
            "model": self.model,
            "digest": self.partition.base,
            "data": {
                "file": self.file,
                "digest": self.data.digest,
                "items": self.items,
                "tokens": self.tokens[1],
                "warnings": list(self.data.warnings),
            },
            "settings": asdict(self.options),
            "partition": self.partition.digest(),
            "experts": self.partition.experts,
            "sizes": sizes,
            "shared": {str(number): of.shared for number, of in self.partition.layers.items()},
            "difference": self.difference,
            "loss": self.loss,
            "curves": [{"selector": name, "points": [p.document() for p in points]} for name, points in self.curves.items()],
        }

    def write(self, out: Path) -> None:
        """Write partition.json, and the partition itself below partition/."""
        out.mkdir(parents=True, exist_ok=True)
        write_partition(out / FOLDER, self.partition)
        write_json(out / RECORD, self.document(), indent=1)


@dataclass(frozen=True)
class PartitionTexts:
    """What the dense model computes on the texts, which the analyses of several partitions of a model share.

    Attributes:
        settings: Items, tokens and seed of the options that chose the texts.
        layers: The feed-forward layers.
        held_out: Items whose loss is measured.
        rows: Their tokens.
        fitted: Sample of train items that divides neurons and fits selectors.
        judged: Sample of the held-out items.
        dense: Losses of the held-out items on the dense model.
    """

    settings: tuple[int, int, int]
    layers: tuple[FeedForward, ...]
    held_out: tuple[Item, ...]
    rows: tuple[ItemRow, ...]
    fitted: FeedForwardSample
    judged: FeedForwardSample
    dense: ItemLosses


def partition_texts(subject: NeuronSubject, data: Labelled, options: PartitionOptions) -> PartitionTexts:
    """Run the dense model on train items and on held-out items.

    Args:
        subject: The model.
        data: The labelled texts.
        options: The settings, of which the numbers of items and tokens and the seed count.

    Raises:
        WorkbenchError: If the model is a mixture already.
    """
    layers = feed_forward_layers(subject.model, subject.sites)
    train, held_out = data.of("train"), some_of_each_task(data.of("heldout"), options.items)
    rows = subject.rows(held_out)
    size, seed = options.tokens, options.seed
    fitted = sample_feed_forward(subject.model, layers, subject.rows(train), size=size, seed=seed)
    judged = sample_feed_forward(subject.model, layers, rows, size=size, seed=seed)
    dense = losses(subject.model, rows)
    return PartitionTexts(_texts_of(options), layers, tuple(held_out), tuple(rows), fitted, judged, dense)


def _texts_of(options: PartitionOptions) -> tuple[int, int, int]:
    return options.items, options.tokens, options.seed


def analyze_partition(
    subject: NeuronSubject,
    data: Labelled,
    shown: str,
    options: PartitionOptions | None = None,
    texts: PartitionTexts | None = None,
) -> PartitionAnalysis:
    """Divide the neurons of every layer on train items, and measure selectors on held-out items.

    Args:
        subject: The model.
        data: The labelled texts.
        shown: Name of their file.
        options: The settings.
        texts: What an earlier call of `partition_texts` has computed for this model, these texts and the same settings.

    Raises:
        WorkbenchError: If the model is a mixture already, the experts do not divide its neurons, or a share of experts is not between 0
            and 100 percent or smaller than that of the shared experts.
        ValueError: If `texts` was computed with other settings.
    """
    options = options or PartitionOptions()
    division = Division(options.method, options.experts, options.shared, seed=options.seed)
    division.check({site.layer: site.units for site in subject.sites if site.kind == "neurons"})
    counts = options.counts()
    texts = texts or partition_texts(subject, data, options)
    if texts.settings != _texts_of(options):
        raise ValueError(f"texts of items, tokens and seed {texts.settings}, expected {_texts_of(options)}")
    partition = divide(
        replace(division, most_shared=counts[0]),
        texts.layers,
        texts.fitted,
        progress=lambda done, total: subject.tell(done, total, "experts"),
    )
    partition = replace(partition, base=subject.digest)
    counts = [count for count in counts if count >= max(partition.shared)]
    curves: dict[str, tuple[SelectorPoint, ...]] = {}
    made = _selectors(options, texts.fitted, partition)
    for number, selector in enumerate(made):
        points = []
        for count in counts:
            with selecting(subject.model, texts.layers, partition, selector, count):
                selected = losses(subject.model, texts.rows)
            mass = float(captured(texts.judged, partition, selector, count).mean())
            points.append(_point(count, options.experts, mass, selected, texts.dense, texts.held_out))
        curves[selector.name] = tuple(points)
        subject.tell(number + 1, len(made), f"selector {selector.name}")
    return PartitionAnalysis(
        subject.name,
        shown,
        data,
        len(texts.held_out),
        (texts.fitted.tokens, texts.judged.tokens),
        partition,
        dense_difference(texts.judged, partition),
        texts.dense.mean,
        curves,
        options,
    )


def _selectors(options: PartitionOptions, sample: FeedForwardSample, partition: Partition) -> list[Selector]:
    """Return the selectors, fitted on a sample."""
    made: list[Selector] = []
    for name in options.selectors:
        if name == "oracle":
            made.append(oracle(sample.layers, partition))
        elif name == "centroid":
            made.append(centroids(sample.layers, partition))
        elif name == "ridge":
            made.append(ridges(sample, partition))
        elif name == "mlp":
            made.append(mlps(sample, partition, seed=options.seed))
        elif (chosen := representatives(sample.layers, partition)) is not None:
            made.append(chosen)
    if not made:
        raise UsageError(
            f"a partition by {partition.method} names no neurons that stand for experts, so it has no selector `representative`",
            "Name another selector, or divide the neurons by cmoe.",
        )
    return made


def _point(
    count: int, experts: int, mass: float, selected: ItemLosses, dense: ItemLosses, items: Sequence[Item]
) -> SelectorPoint:
    """Return a point with the interval of the rise."""
    rise, low, high = loss_rise(selected, dense, items)
    return SelectorPoint(count, 100 * count / experts, mass, selected.mean, rise, low, high)


def loss_rise(changed: ItemLosses, dense: ItemLosses, items: Sequence[Item]) -> tuple[float, float, float]:
    """Return the rise of the loss in nats per token with its 95 % interval, t · jackknife error over tasks.

    Args:
        changed: Losses on the changed model.
        dense: Losses of the same items on the dense model.
        items: The items.
    """
    tokens = dense.tokens.numpy().astype(np.float64)
    counted = tokens > 0
    cluster = codes(ItemGroups.of(items).cluster[counted].tolist())
    change = (changed.sums - dense.sums).numpy()[None, counted]
    (rise,), covariance, df = clustered_rates(change, tokens[counted], cluster)
    half = upper_t(0.025, df) * math.sqrt(covariance[0, 0]) if math.isfinite(df) else math.inf
    return float(rise), float(rise) - half, float(rise) + half
