"""Counterparts: which layers of the source each layer of the target takes, and the linear layers in them that take an update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from workbench.adapters.approximate import Live
from workbench.errors import UsageError
from workbench.models.layout import Model

Rule = Literal["same", "skip", "avg", "map"]


@dataclass(frozen=True)
class LayerMap:
    """The layers of the source that each layer of the target takes.

    Attributes:
        rule: How the map was made; "map" for one that the user wrote.
        sources: Layer of the target -> layers of the source, whose updates are averaged. Other layers of the target take none.
    """

    rule: Rule
    sources: Mapping[int, tuple[int, ...]]


def layer_map(rule: Literal["skip", "avg"] | None, source: int, target: int) -> LayerMap:
    """Return the layer map of a rule.

    Layer j of the target stands for the layers ⌊jS/T⌋ to ⌊(j+1)S/T⌋ − 1 of the source: `skip` takes the first of them, `avg` the mean
    of all. If the target is deeper, several of its layers take the same layer of the source.

    Args:
        rule: The rule; None takes equal layers if the depths are equal, and else `skip`.
        source: Number of layers S of the source.
        target: Number of layers T of the target.

    Source:
        Klimaszewski et al. 2024, Is Modularity Transferable?, arXiv 2403.18804, section 3: SKIP and AVG for models whose depths are
        multiples of each other. For other depths, this is the even spacing that gives the same layers there.
    """
    if source == target:
        return LayerMap("same", {j: (j,) for j in range(target)})
    first = {j: j * source // target for j in range(target)}
    if rule == "avg":
        return LayerMap("avg", {j: tuple(range(i, max(i + 1, (j + 1) * source // target))) for j, i in first.items()})
    return LayerMap("skip", {j: (i,) for j, i in first.items()})


def parsed_map(text: str, source: int, target: int) -> LayerMap:
    """Parse a layer map such as "0:0,1:2,2:4+5": layer of the target, then the layers of the source that it takes the mean of.

    Args:
        text: The map.
        source: Number of layers of the source.
        target: Number of layers of the target.

    Raises:
        UsageError: If the text is no such map, a layer of the target stands in it twice, or a layer does not exist.
    """
    sources: dict[int, tuple[int, ...]] = {}
    for entry in text.split(","):
        left, colon, right = entry.strip().partition(":")
        numbers = [left, *right.split("+")]
        if not colon or not all(number.strip().isdecimal() for number in numbers):
            raise UsageError(
                f"--map: expected TARGET:SOURCE, found {entry.strip()!r}",
                "Write the target's layer, a colon and the source's layer: --map 0:0,1:2; or a mean of layers: --map 0:0+1,1:2+3.",
            )
        layer, *taken = (int(number) for number in numbers)
        for number, depth, model in [(layer, target, "target"), *((n, source, "source") for n in taken)]:
            if number >= depth:
                raise UsageError(
                    f"--map {entry.strip()}: layer {number} of the {model} does not exist; it has layers 0 to {depth - 1}",
                    "The target's layer comes first: TARGET:SOURCE.",
                )
        if layer in sources:
            raise UsageError(
                f"--map: layer {layer} of the target stands in the map twice", "Write 0:1+2 to take the mean of two layers."
            )
        sources[layer] = tuple(dict.fromkeys(taken))
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
