"""Dense feed-forward layers of a live model with the matrices into their neurons, and samples of their inputs and activations.

A neuron is row i of the matrix into it (of the gate and of the up projection, if the layer is gated) and column i of the matrix out of
it. A partition of neurons needs all of them; where a layer keeps gate and up projection in one matrix, its first half is the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from workbench.activations.labelled import ItemRow
from workbench.activations.sites import Site, Tokens, sample_places, stream
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d
from workbench.models.hooks import hooked, n_outputs, shaped

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = 2048
"""Largest number of tokens of a sample."""
_FUNCTIONS = ("act_fn", "act", "activation_fn", "activation", "activation_func")
SAMPLE_BYTES = 2 * 10**9
"""Largest size of a sample in memory. A larger model is sampled on fewer tokens."""


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward layer.

    Attributes:
        site: Its neurons, and the matrix out of them.
        reader: Module with the matrix into the neurons; the gate's if the layer is gated.
        up: Module of the up projection of a gated layer; None if there is none. It is `reader` if one matrix holds both.
        function: The layer's activation function; None if it has an unknown name.
    """

    site: Site
    reader: torch.nn.Module
    up: torch.nn.Module | None
    function: Callable[[Tensor], Tensor] | None

    @property
    def is_gated(self) -> bool:
        """True if an activation is the product of a gate and an up projection."""
        return self.up is not None

    def gate_rows(self) -> Tensor:
        """Return the rows of the gate, or of the only matrix into the neurons [neurons, hidden], float32."""
        return _rows(self.reader)[: self.site.units]

    def up_rows(self) -> Tensor:
        """Return the rows of the up projection [neurons, hidden], float32.

        Raises:
            ValueError: If the layer is not gated.
        """
        if self.up is None:
            raise ValueError("a layer without a gate has no up projection")
        return _rows(self.up)[-self.site.units :]

    def activated(self, values: Tensor) -> Tensor:
        """Apply the layer's activation function.

        Raises:
            WorkbenchError: If it is unknown.
        """
        if self.function is None:
            raise WorkbenchError(
                f"{self.site.name}: the activation function beside it has none of the names {', '.join(_FUNCTIONS)}",
                "Use `random`, `kmeans` or `coactivation`, which do not need it.",
            )
        return self.function(values)


def _rows(module: torch.nn.Module) -> Tensor:
    """Return the weight of a linear module as [outputs, inputs], float32."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return (weight.detach().T if is_conv1d(module) else weight.detach()).float()


def feed_forward_layers(model: PreTrainedModel, sites: Sequence[Site]) -> tuple[FeedForward, ...]:
    """Return the feed-forward layers of a dense model.

    Args:
        model: The live model.
        sites: Its sites.

    Raises:
        WorkbenchError: If a layer has experts already, or the matrices into its neurons cannot be told apart.
    """
    if routed := [site.layer for site in sites if site.kind == "experts"]:
        raise UsageError(
            f"layer {routed[0]} is a mixture of experts already ({len(routed)} such layers)",
            "Neurons of dense feed-forward layers can be divided into experts.",
        )
    return tuple(_feed_forward(model, site) for site in sites)


def _feed_forward(model: PreTrainedModel, site: Site) -> FeedForward:
    """Find the matrices into the neurons: the linear modules beside the output projection with an output for each neuron."""
    parent = model.get_submodule(site.name.rpartition(".")[0])
    function = next((f for name in _FUNCTIONS if callable(f := getattr(parent, name, None))), None)
    beside = {n: m for n, m in parent.named_children() if m is not site.module}
    single = {n: m for n, m in beside.items() if n_outputs(m) == site.units}
    double = {n: m for n, m in beside.items() if n_outputs(m) == 2 * site.units}
    if len(single) == 1:
        return FeedForward(site, next(iter(single.values())), None, function)
    if not single and len(double) == 1 and "gate_up" in next(iter(double)):
        module = next(iter(double.values()))
        return FeedForward(site, module, module, function)
    gates = [n for n in single if "gate" in n]
    if len(single) == 2 and len(gates) == 1:
        (other,) = (m for n, m in single.items() if n != gates[0])
        return FeedForward(site, single[gates[0]], other, function)
    found = ", ".join([*single, *double]) or "none"
    raise WorkbenchError(
        f"{site.name}: expected one matrix into the neurons beside it, or a gate and an up projection; found {found}",
        "Report this architecture: workbench/activations/feedforward.py lacks its module names.",
    )


@dataclass(frozen=True)
class FeedForwardSample:
    """Inputs and activations of all feed-forward layers on a sample of tokens.

    Attributes:
        layers: The layers.
        inputs: Per layer, what its matrices into the neurons read [tokens, hidden], float32 on the CPU.
        activations: Per layer, the activations of its neurons [tokens, neurons], float32 on the CPU.
    """

    layers: tuple[FeedForward, ...]
    inputs: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in the sample."""
        return len(self.inputs[0])

    def magnitudes(self, number: int) -> Tensor:
        """Return |aᵢ|·‖W_out[:, i]‖ of every neuron of a layer on every token [tokens, neurons]."""
        return self.activations[number].abs() * self.layers[number].site.norms().cpu()


def sample_feed_forward(
    model: PreTrainedModel, layers: Sequence[FeedForward], rows: Sequence[ItemRow], *, size: int = TOKENS, seed: int = 0
) -> FeedForwardSample:
    """Return the inputs and activations of feed-forward layers on a random sample of tokens, in one pass over the texts.

    Args:
        model: The live model.
        layers: Its feed-forward layers.
        rows: The texts.
        size: Largest number of tokens. Fewer are drawn if the sample would exceed `SAMPLE_BYTES`.
        seed: Seed of the sample.
    """
    width = sum(layer.site.units + layer.gate_rows().shape[1] for layer in layers)
    places = sample_places([len(row.tokens) for row in rows], max(1, min(size, SAMPLE_BYTES // (4 * width))), seed=seed)
    chosen = torch.unique(places[:, 0]).tolist()
    where = [(places[:, 0] == row).nonzero().flatten() for row in chosen]
    inputs: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}

    def record(store: dict[int, Tensor], number: int, values: Tensor, batch: Tokens) -> None:
        buffer = store.setdefault(number, torch.empty(len(places), values.shape[-1]))
        for b, row in enumerate(batch.rows.tolist()):
            buffer[where[row]] = values[b, places[where[row], 1].to(values.device)].float().cpu()

    with reading(layers) as seen:

        def consume(number: int, values: Tensor, batch: Tokens) -> None:
            record(activations, number, values, batch)
            record(inputs, number, shaped(seen[number], *values.shape[:2]), batch)

        stream(model, [layer.site for layer in layers], [rows[i] for i in chosen], consume, "whole")
    order = range(len(layers))
    return FeedForwardSample(tuple(layers), tuple(inputs[n] for n in order), tuple(activations[n] for n in order))


@contextmanager
def reading(layers: Sequence[FeedForward]) -> Iterator[dict[int, Tensor]]:
    """Record the latest input of each layer's matrix into the neurons within the block: number of the layer -> input."""
    seen: dict[int, Tensor] = {}

    def record(number: int, _module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[number] = args[0]

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(hooked(layer.reader, before=partial(record, number)))
        yield seen
