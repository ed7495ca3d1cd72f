"""A brick's delta on a live model: whole outside the feed-forward neurons, and gated on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.emergent.gates import GatedModule, Product
from workbench.emergent.places import NeuronAxis, neuron_axes
from workbench.emergent.sites import Site, find_sites
from workbench.errors import UsageError, WorkbenchError
from workbench.lazy import torch
from workbench.merge.streaming.deltas import Deltas
from workbench.models.architecture import is_conv1d
from workbench.models.conversion import live_names
from workbench.models.layout import Model
from workbench.models.live import compute, live_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GatedBase:
    """A live base with the delta of a brick: whole outside the feed-forward neurons, gated on each of them.

    Attributes:
        model: The live model in float32. Without gates, it has no delta on its neurons.
        sites: Its sites.
        modules: The linear layers with the neurons' delta.
    """

    model: PreTrainedModel
    sites: tuple[Site, ...]
    modules: list[GatedModule]


def gated_base(brick: Deltas, base: Model, path: Path, label: str, device: torch.device) -> GatedBase:
    """Load a base with a brick's delta outside the neurons, and the neurons' delta beside it, as factors if it has any.

    Args:
        brick: The brick's deltas.
        base: The base.
        path: Directory of the base's files.
        label: Name of the brick in messages.
        device: Device of the model.

    Raises:
        WorkbenchError: If the model is a mixture of experts, or a tensor of its neurons is no linear layer of the live model.
    """
    axes = {name: axis for name, axis in neuron_axes(base).items() if brick.touches(name)}
    tensors = compute(base, torch.float32, device)
    for name, tensor in tensors.items():
        if name not in axes and brick.touches(name):
            tensor += whole_delta(brick, base, name, device, tensor).view_as(tensor)
    live = live_model(base.config, tensors, path, device)
    sites = find_sites(live, base.layout.depth, device)
    if routed := [site.layer for site in sites if site.kind == "experts"]:
        raise UsageError(
            f"{label}: layer {routed[0]} is a mixture of experts, and gates are trained for neurons of dense layers",
            "Leave --trained out: experts are then chosen by where the delta acts.",
        )
    return GatedBase(live, sites, gated_modules(brick, base, axes, live, sites, label))


def whole_delta(brick: Deltas, base: Model, name: str, device: torch.device, values: Tensor | None = None) -> Tensor:
    """Return the delta of one tensor in its row view [rows, cols], float32.

    Args:
        brick: The brick's deltas, which touch the tensor.
        base: The base.
        name: The tensor.
        device: Device to read on.
        values: The base's tensor in float32, if it is in memory already.
    """
    spec = base.weights.specs[name]
    if values is None:
        values = torch.empty(spec.rows, spec.cols, device=device)
        base.weights.open(name, device).read(0, spec.rows, values)
    out = torch.empty(spec.rows, spec.cols, device=device)
    brick.open_delta(name, device).read_delta(0, spec.rows, values.reshape(spec.rows, spec.cols), out)
    return out


def gated_modules(
    brick: Deltas,
    base: Model,
    axes: Mapping[str, NeuronAxis],
    live: PreTrainedModel,
    sites: Sequence[Site],
    label: str,
) -> list[GatedModule]:
    """Return the linear layers of a live model with a brick's delta.

    Args:
        brick: The brick's deltas.
        base: The base.
        axes: Tensors of the base that the brick touches -> the axis of its neurons.
        live: The live model.
        sites: Its sites.
        label: Name of the brick in messages.

    Raises:
        WorkbenchError: If a tensor is not the weight or the bias of one linear layer.
    """
    device = next(live.parameters()).device
    places, number = live_names(base.config, base.weights.specs), {site.layer: i for i, site in enumerate(sites)}
    modules = dict(live.named_modules())
    parts: dict[str, dict[str, str]] = {}
    for name in axes:
        (module, _, kind), *others = [place.rpartition(".") for place in places[name]] or [("", "", "")]
        layer: Any = modules.get(module)
        if others or kind not in ("weight", "bias") or not (isinstance(layer, torch.nn.Linear) or is_conv1d(layer)):
            raise WorkbenchError(
                f"{label}: {name} is not the weight or the bias of one linear layer, so its delta cannot be gated by neuron",
                "Leave --trained out: neurons are then chosen by where the delta acts.",
            )
        parts.setdefault(module, {})[kind] = name
    made = []
    for module, kinds in parts.items():
        axis = axes[next(iter(kinds.values()))]
        weight, bias = kinds.get("weight"), kinds.get("bias")
        product = _product(brick, base, weight, is_conv1d(modules[module]), device) if weight else _nothing(modules[module])
        shift = whole_delta(brick, base, bias, device).flatten() if bias else None
        made.append(GatedModule(module, number[axis.layer], product, shift, axis.is_out))
    return made


def _product(brick: Deltas, base: Model, name: str, is_transposed: bool, device: torch.device) -> Product:
    """Return the map from a layer's inputs to what the delta of its weight adds; low-rank deltas stay factors."""
    factors = brick.factors(name, device)
    if factors is not None:
        if is_transposed:  # stored as [in, out]
            return lambda x: (x @ factors.left) @ factors.right
        return lambda x: (x @ factors.right.T) @ factors.left.T
    delta = whole_delta(brick, base, name, device)
    matrix = delta if is_transposed else delta.T
    return lambda x: x @ matrix


def _nothing(module: Any) -> Product:
    """Return the map of a weight without a delta, for a layer whose bias alone has one."""
    width = module.weight.shape[1] if is_conv1d(module) else module.weight.shape[0]
    return lambda x: x.new_zeros(*x.shape[:-1], width)
