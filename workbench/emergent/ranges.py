"""Switching neurons off only within a range of their activation, so that what they do at other activations stays.

Activations of a neuron on the texts of one function are often distributed like a Gaussian, at another place than on other texts. A range
around their mean changes the function and leaves the rest. It depends on the activation, so it is no change of weights.

Source: Haider et al. 2025, Neurons Speak in Ranges (NeuronLens), arXiv 2502.06809; there the range is the mean ± 2.5 standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.emergent.ablate import losses_with_each
from workbench.emergent.activations import Progress, Tokens, stream
from workbench.emergent.labelled import PROMPT, Counted, ItemRow
from workbench.emergent.losses import SetLosses
from workbench.emergent.sets import NeuronSet
from workbench.emergent.sites import Site, visiting
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Moments:
    """Means and standard deviations of activations over the counted tokens of each function's texts.

    Attributes:
        mean: Layer -> mean activation [functions, units] float64.
        std: Layer -> standard deviation [functions, units] float64.
    """

    mean: Mapping[int, Tensor]
    std: Mapping[int, Tensor]

    def bounds(self, neurons: NeuronSet, function: int, between: tuple[float, float]) -> Bounds:
        """Return layer -> lowest and highest activation of each neuron of a set.

        Args:
            neurons: The set.
            function: The function whose texts count.
            between: Ends of the range, in standard deviations from the mean.
        """
        result = {}
        for layer, index in neurons.indices.items():
            mean, std = self.mean[layer][function, index], self.std[layer][function, index]
            result[layer] = (mean + between[0] * std, mean + between[1] * std)
        return result


Bounds = Mapping[int, "tuple[Tensor, Tensor]"]
"""Layer -> lowest and highest activation of each neuron of a set, in the order of its indices."""


def activation_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    functions: Sequence[int],
    counted: Counted = PROMPT,
    *,
    progress: Progress = lambda *_: None,
) -> Moments:
    """Return means and standard deviations of the signed activations of every unit, function by function.

    Args:
        model: The live model.
        sites: Its sites.
        rows: Texts.
        functions: Function of each text, from 0.
        counted: Tokens that count.
        progress: Progress callback; it counts texts.
    """
    of = torch.tensor(list(functions))
    count = int(of.max()) + 1
    sums = [torch.zeros(2, count, site.units, dtype=torch.float64) for site in sites]
    tokens = torch.zeros(len(sites), count, dtype=torch.float64)

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        own = of[batch.rows.cpu()]
        for function in sorted(set(own.tolist())):
            chosen = activations[(own == function).to(activations.device)]
            values = chosen[batch.counted[(own == function).to(batch.counted.device)]].double().cpu()
            sums[site][0, function] += values.sum(0)
            sums[site][1, function] += values.square().sum(0)
            tokens[site, function] += len(values)

    stream(model, sites, rows, consume, counted, after=lambda done: progress(done, len(rows)))
    mean, std = {}, {}
    for number, site in enumerate(sites):
        first, second = sums[number] / tokens[number].clamp_min(1)[:, None]
        mean[site.layer] = first
        std[site.layer] = (second - first.square()).clamp_min(0).sqrt()
    return Moments(mean, std)


def switching_off_between(model: PreTrainedModel, sites: Sequence[Site], neurons: NeuronSet, bounds: Bounds) -> Any:
    """Return a context in which the neurons of a set add nothing while their activation lies within its bounds, ends included.

    Args:
        model: The live model.
        sites: Its sites.
        neurons: The set.
        bounds: Bounds of its neurons.
    """

    def visit(number: int, activations: Tensor) -> Tensor | None:
        layer = sites[number].layer
        if layer not in neurons.indices:
            return None
        index = neurons.indices[layer].to(activations.device)
        low, high = (end.to(activations.device, activations.dtype) for end in bounds[layer])
        values = activations[..., index]
        changed = activations.clone()
        changed[..., index] = values.masked_fill((values >= low) & (values <= high), 0.0)
        return changed

    return visiting(model, sites, visit)


def ablate_between(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    sets: Sequence[NeuronSet],
    bounds: Sequence[Bounds],
    *,
    progress: Progress = lambda *_: None,
) -> SetLosses:
    """Compute the loss of every item with each set switched off within its bounds, and with none.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The items' texts.
        sets: Neuron sets with different names; each costs one pass over the items.
        bounds: Bounds of each set.
        progress: Progress callback; it counts passes.

    Raises:
        WorkbenchError: If a set belongs to a model with other layers.
        ValueError: If two sets have the same name.
    """

    def switch(number: int) -> Any:
        return switching_off_between(model, sites, sets[number], bounds[number])

    return losses_with_each(model, sites, rows, sets, switch, scored="whole", progress=progress)
