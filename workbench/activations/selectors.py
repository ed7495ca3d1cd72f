"""Selectors of experts: they choose the experts of each token, and are judged by the mass that they capture.

The mass of an expert on a token is the sum of |aᵢ|·‖W_out[:, i]‖ over its neurons. The oracle knows it; the other selectors see only what the
layer reads. Linear selectors can be the router of a stock mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.feedforward import FeedForward, FeedForwardSample, reading
from workbench.activations.partition import LayerPartition, Partition
from workbench.activations.sites import visiting
from workbench.ground.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SelectorName: TypeAlias = Literal["oracle", "centroid", "ridge"]
RIDGE = 1e-2
"""Value added to the diagonal of the inputs' second moments, relative to the mean of the diagonal."""


@dataclass(frozen=True)
class Oracle:
    """Selects the experts of the largest mass, which are known only after all neurons are computed."""

    layers: tuple[FeedForward, ...]
    experts: tuple[LayerPartition, ...]
    name: SelectorName = "oracle"

    def scores(self, number: int, inputs: Tensor, activations: Tensor) -> Tensor:
        """Return the mass of every expert [..., experts].

        Args:
            number: Number of the layer among the partition's layers.
            inputs: What the layer reads [..., hidden].
            activations: Its activations [..., neurons].
        """
        norms = self.layers[number].site.norms().to(activations.device)
        return self.experts[number].sums(activations.float().abs() * norms)


@dataclass(frozen=True)
class Linear:
    """Selects by a linear function of what the layer reads, as the router of a mixture of experts does.

    Attributes:
        name: Name of the selector.
        rows: Per layer, the row of each expert [experts, hidden].
    """

    name: SelectorName
    rows: tuple[Tensor, ...]

    def scores(self, number: int, inputs: Tensor, activations: Tensor) -> Tensor:
        """Return x · row of every expert [..., experts]."""
        return inputs.float() @ self.rows[number].T.to(inputs.device)


Selector: TypeAlias = Oracle | Linear
"""Scores the experts of a layer; those with the highest scores are selected."""


def oracle(layers: Sequence[FeedForward], partition: Partition) -> Oracle:
    """Return the selector of the largest mass."""
    return Oracle(tuple(layers), tuple(partition.layers.values()))


@no_grad
def centroids(layers: Sequence[FeedForward], partition: Partition) -> Linear:
    """Return the selector whose rows are the means of the experts' gate rows (MoEfication)."""
    experts = partition.layers.values()
    return Linear(
        "centroid",
        tuple(layer.gate_rows().cpu()[divided.experts].mean(1) for layer, divided in zip(layers, experts, strict=True)),
    )


@no_grad
def ridges(sample: FeedForwardSample, partition: Partition) -> Linear:
    """Return the linear selector that predicts each expert's share of the mass best on a sample, by ridge regression."""
    rows = []
    for number, x in enumerate(sample.inputs):
        wide = x.double()
        gram = wide.T @ wide
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        rows.append(torch.linalg.solve(gram, wide.T @ shares(sample, partition, number).double()).T.float())
    return Linear("ridge", tuple(rows))


def shares(sample: FeedForwardSample, partition: Partition, number: int) -> Tensor:
    """Return each expert's share of the mass on every token of a sample [tokens, experts]."""
    divided = tuple(partition.layers.values())[number]
    mass = divided.sums(sample.magnitudes(number))
    return mass / mass.sum(1, keepdim=True).clamp_min(1e-30)


def selected(scores: Tensor, shared: int, count: int) -> Tensor:
    """Return which experts serve each token: the shared ones, and those with the highest scores [..., experts] bool.

    Args:
        scores: Scores [..., experts].
        shared: Number of shared experts at the start.
        count: Number of experts of a token, shared ones included.

    Raises:
        ValueError: If there are more shared experts than that.
    """
    if shared > count:
        raise ValueError(f"{shared} shared experts are more than the {count} experts of a token")
    first = torch.arange(scores.shape[-1], device=scores.device) < shared
    index = scores.masked_fill(first, float("inf")).topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


@no_grad
def captured(sample: FeedForwardSample, partition: Partition, selector: Selector, count: int) -> Tensor:
    """Return the share of the mass that the selected experts have, mean over the tokens of a sample [layers].

    Args:
        sample: The sample.
        partition: The partition.
        selector: The selector.
        count: Number of experts of a token.
    """
    means = []
    for number, divided in enumerate(partition.layers.values()):
        scores = selector.scores(number, sample.inputs[number], sample.activations[number])
        chosen = selected(scores, divided.shared, count)
        means.append((shares(sample, partition, number) * chosen).sum(1).mean())
    return torch.stack(means)


@contextmanager
def selecting(
    model: PreTrainedModel, layers: Sequence[FeedForward], partition: Partition, selector: Selector, count: int
) -> Iterator[None]:
    """Let only the selected experts of each token add to the output within the block. The sum is not weighted.

    Args:
        model: The live model.
        layers: Its feed-forward layers.
        partition: Their experts.
        selector: The selector.
        count: Number of experts of a token.
    """
    experts = tuple(partition.layers.values())
    members = [divided.members() for divided in experts]

    with reading(layers) as seen:

        def visit(number: int, activations: Tensor) -> Tensor:
            scores = selector.scores(number, seen[number], activations)
            chosen = selected(scores, experts[number].shared, count)
            return activations * chosen[..., members[number].to(activations.device)]

        with visiting(model, [layer.site for layer in layers], visit):
            yield


@no_grad
def dense_difference(sample: FeedForwardSample, partition: Partition) -> float:
    """Return how far the sum of all experts is from the dense layer, which must be rounding alone.

    Returns:
        The largest difference over layers, tokens and channels, relative to the layer's largest output.
    """
    worst = 0.0
    for number, divided in enumerate(partition.layers.values()):
        columns, a = sample.layers[number].site.columns().float().cpu(), sample.activations[number]
        dense = a @ columns
        experts = sum((a[:, index] @ columns[index] for index in divided.experts), torch.zeros_like(dense))
        worst = max(worst, float((experts - dense).abs().max() / dense.abs().max().clamp_min(1e-30)))
    return worst
