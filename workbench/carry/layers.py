"""Layer maps: which layers of the source each layer of the target takes its update from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from workbench.errors import UsageError

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
