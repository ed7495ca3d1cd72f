"""Counterparts: for each update of an adapter, the linear layers of another model that take it, and updates that none takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from workbench.adapters.approximate import Live
from workbench.carry.layers import LayerMap
from workbench.models.layout import Model


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model.

    Attributes:
        name: The weight's name on disk.
        module: The live module.
        layer: The layer that it belongs to; None outside the layers.
        part: The weight's name within its layer, such as "self_attn.q_proj.weight"; the whole name outside the layers.
        inputs: Number of inputs.
        outputs: Number of outputs.
        conv1d: Whether the weight is stored as [inputs, outputs].
    """

    name: str
    module: str
    layer: int | None
    part: str
    inputs: int
    outputs: int
    conv1d: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.outputs, self.inputs


@dataclass(frozen=True)
class Move:
    """A linear layer of the target, and those of the source whose updates it takes.

    Attributes:
        target: The layer that takes the updates.
        sources: Layers with an update.
        weight: Factor of each update; 1 over the number of layers that the target's layer stands for.
    """

    target: Linear
    sources: tuple[Linear, ...]
    weight: float


@dataclass(frozen=True)
class Plan:
    """What is carried, and what is not.

    Attributes:
        moves: The linear layers of the target that take an update, in the order of its tensors.
        left: Tensor of the source with an update that is carried nowhere -> the reason.
    """

    moves: tuple[Move, ...]
    left: Mapping[str, str]


def linears(model: Model, live: Live) -> dict[str, Linear]:
    """Return the linear layers of a model by the names of their weights on disk.

    Weights that transformers fuses, splits or stacks, such as those of experts, are not among them.

    Args:
        model: The model.
        live: Its modules.
    """
    layout, found = model.layout, {}
    for name, place in live.places.items():
        if place.kind not in ("linear", "conv1d"):
            continue
        layer, conv1d = layout.layer(name), place.kind == "conv1d"
        part = name if layer is None else name[len(f"{layout.prefix}{layer}.") :]
        rows, cols = model.weights.specs[name].shape
        found[name] = Linear(name, place.module, layer, part, *((rows, cols) if conv1d else (cols, rows)), conv1d=conv1d)
    return found


def plan_moves(updated: Collection[str], source: Mapping[str, Linear], target: Mapping[str, Linear], layers: LayerMap) -> Plan:
    """Find the counterparts of an adapter's updates: the same part in the layers that the map names.

    Args:
        updated: Tensors of the source that the adapter updates.
        source: The source's linear layers.
        target: The target's linear layers.
        layers: The layer map.
    """
    left = {name: "it is no linear layer of its own in transformers" for name in updated if name not in source}
    of_place = {(linear.layer, linear.part): linear for linear in (source[name] for name in updated if name in source)}
    parts = {linear.part for linear in target.values()}
    moves, carried = [], set()
    for linear in target.values():
        if linear.layer is None or linear.layer not in layers.sources:
            continue
        taken = layers.sources[linear.layer]
        sources = tuple(of_place[i, linear.part] for i in taken if (i, linear.part) in of_place)
        if sources:
            moves.append(Move(linear, sources, 1 / len(taken)))
            carried |= {one.name for one in sources}
    used = {layer for taken in layers.sources.values() for layer in taken}
    for (layer, part), linear in of_place.items():
        if linear.name in carried:
            continue
        if layer is None:
            left[linear.name] = "it lies outside the layers"
        elif part not in parts:
            left[linear.name] = "the target has no module of this name"
        elif layer not in used:
            left[linear.name] = "no layer of the target takes its layer"
        else:
            left[linear.name] = "the target's layer has no such module"
    return Plan(tuple(moves), left)
