"""Stack: reorder, repeat or leave out layers of a model."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from workbench.errors import WorkbenchError
from workbench.grow.expansion.layers import in_order, reordered
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Grown, Growth, Learns, Preserves, register
from workbench.steps.fields import Real, Strict, Whole


class Slice(Strict):
    """A range of consecutive layers."""

    layers: tuple[Whole, Whole]
    """First layer, and the layer after the last one: [8, 32] is layers 8 to 31."""
    scale: dict[str, Real] = {}
    """Factors for tensors of these layers, by glob over the tensor's name within a layer: {"self_attn.o_proj.*": 0.5}. The first
    glob that matches a tensor applies."""

    @field_validator("layers")
    @classmethod
    def _check_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"expected 0 <= first < end, found {list(value)}")
        return value


@register
class Stack(GrowMethod):
    """Stack slices of layers, as in SOLAR's depth up-scaling (Kim et al. 2023) and mergekit's `passthrough`.

    The result computes another function and needs further training. The first occurrence of a layer keeps its bricks; repeated
    layers count as new.
    """

    paper = "Kim et al. 2023, SOLAR 10.7B: Depth Up-Scaling, arXiv 2312.15166"
    formula = "layers [a, b), [c, d), ... of the model in sequence; tensors times `scale`"
    preserves: ClassVar[Preserves] = "no"

    grow: Literal["stack"]
    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    """The slices, from the first layer up: [{layers: [0, 24]}, {layers: [8, 32]}]."""
    order: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Instead of `slices`: the layers one by one, such as [0, 1, 2, 1, 2, 3]."""

    @model_validator(mode="after")
    def _check_fields(self) -> Stack:
        if (self.slices is None) == (self.order is None):
            raise ValueError(
                "expected one of `slices: [{layers: [0, 24]}, ...]` and `order: [0, 1, 1]`, found "
                + ("none" if self.slices is None else "both")
            )
        return self

    def learning(self) -> Learns:
        """Return when all additions have a gradient: after one step if a factor is 0, as in LLaMA Pro.

        The tensors with factor 0 get a gradient first, and pass one on to the others from then on.
        """
        zero = any(factor == 0 for s in self.slices or () for factor in s.scale.values())
        return "after_one_step" if zero else self.learns

    def places(self, depth: int) -> list[tuple[int, dict[str, float]]]:
        """Return for each new layer the index of the old one, and its factors.

        Raises:
            WorkbenchError: If a layer is out of range.
        """
        slices = self.slices or ()
        # Check the ends first: a slice up to 2³¹ would become a huge list.
        if far := [s.layers[1] - 1 for s in slices if s.layers[1] > depth]:
            raise WorkbenchError(f"grow stack: layer {far[0]} does not exist; the model has layers 0..{depth - 1}", None, 2)
        places = [(i, s.scale) for s in slices for i in range(*s.layers)] or [(i, {}) for i in self.order or ()]
        if bad := [i for i, _ in places if not 0 <= i < depth]:
            raise WorkbenchError(f"grow stack: layer {bad[0]} does not exist; the model has layers 0..{depth - 1}", None, 2)
        return places

    def expand(self, model: Model) -> Growth:
        """Plan the new order of layers.

        Raises:
            WorkbenchError: If a layer is out of range, or a glob of `scale` matches no tensor of its slice.
        """
        layout = model.layout
        places = self.places(layout.depth)
        order = [old for old, _ in places]
        first = {old: new for new, old in reversed(list(enumerate(order)))}
        unused = {(new, glob) for new, (_, scale) in enumerate(places) for glob in scale}

        def make(name: str, new: int) -> Grown:
            local_name = name.removeprefix(f"{layout.prefix}{order[new]}.")
            matching = next((glob for glob in places[new][1] if fnmatchcase(local_name, glob)), None)
            unused.discard((new, matching or ""))
            factor = 1.0 if matching is None else places[new][1][matching]
            return Grown(name, new=first[order[new]] != new, scale=factor)

        tensors = in_order(layout, order, make)
        if unused:
            new, glob = min(unused)
            raise WorkbenchError(
                f"grow stack: the glob {glob!r} of `scale` matches no tensor of layer {order[new]}",
                f"Names in a layer: {', '.join(n.removeprefix(f'{layout.prefix}0.') for n in layout.in_layer(0)[:6])}.",
                2,
            )
        removed = sorted(set(range(layout.depth)) - set(order))
        return Growth(
            tensors,
            reordered(model.config, layout.depth, order, "stack"),
            {"order": order, "new_layers": [n for n, old in enumerate(order) if first[old] != n], "gone_layers": removed},
        )
