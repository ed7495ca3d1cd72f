"""Counterparts: which layers of the source each layer of the target takes, and the linear layers in them that take an update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from workbench.adapters.live import Live
from workbench.ground.errors import UsageError
from workbench.models.layout import Model

Rule = Literal["same", "skip", "map"]


@dataclass(frozen=True)
class LayerMap:
    """The layer of the source that each layer of the target takes.

    Attributes:
        rule: How the map was made; "map" for one that the user wrote.
        sources: Layer of the target -> layer of the source. Other layers of the target take none.
    """

    rule: Rule
    sources: Mapping[int, int]


def layer_map(source: int, target: int) -> LayerMap:
    """Return the layer map for two depths: equal layers, or else layer ⌊jS/T⌋ of S for layer j of T.

    If the target is deeper, several of its layers take the same layer of the source.

    Source:
        Klimaszewski et al. 2024, Is Modularity Transferable?, arXiv 2403.18804, section 3: SKIP for models whose depths are multiples of
        each other. For other depths, this is the even spacing that gives the same layers there.
    """
    return LayerMap("same" if source == target else "skip", {j: j * source // target for j in range(target)})


def parsed_map(text: str, source: int, target: int) -> LayerMap:
    """Parse a layer map such as "0:0,1:2,2:4": layer of the target, then the layer of the source that it takes.

    Args:
        text: The map.
        source: Number of layers of the source.
        target: Number of layers of the target.

    Raises:
        UsageError: If the text is no such map, a layer of the target stands in it twice, or a layer does not exist.
    """
    sources: dict[int, int] = {}
    for entry in map(str.strip, text.split(",")):
        left, _, right = (part.strip() for part in entry.partition(":"))
        if not left.isdecimal() or not right.isdecimal():
            raise UsageError(
                f"--map: expected TARGET:SOURCE, found {entry!r}",
                "Write the target's layer, a colon and the source's layer: --map 0:0,1:2.",
            )
        layer, taken = int(left), int(right)
        for number, depth, model in ((layer, target, "target"), (taken, source, "source")):
            if number >= depth:
                raise UsageError(
                    f"--map {entry}: layer {number} of the {model} does not exist; it has layers 0 to {depth - 1}",
                    "The target's layer comes first: TARGET:SOURCE.",
                )
        if layer in sources:
            raise UsageError(f"--map: layer {layer} of the target stands in the map twice", "Name each layer of the target once.")
        sources[layer] = taken
    return LayerMap("map", dict(sorted(sources.items())))


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
    """A linear layer of the target, and that of the source whose update it takes."""

    target: Linear
    source: Linear


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
        if place.kind not in ("linear", "conv1d") or not place.disk:
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
    moves = []
    for linear in target.values():
        taken = None if linear.layer is None else layers.sources.get(linear.layer)
        if taken is not None and (taken, linear.part) in of_place:
            moves.append(Move(linear, of_place[taken, linear.part]))
    carried, used = {move.source.name for move in moves}, set(layers.sources.values())
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
