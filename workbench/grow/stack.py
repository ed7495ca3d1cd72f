"""Stack: the layers of a model in another order, some of them several times, some left out."""

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
    """Some consecutive layers."""

    layers: tuple[Whole, Whole]
    """First layer, and the one behind the last: [8, 32]."""
    scale: dict[str, Real] = {}
    """Glob over names within a layer -> factor of the tensors that match it, the first that does: {"self_attn.o_proj.*": 0.5}."""

    @field_validator("layers")
    @classmethod
    def _rise(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"expected 0 <= first < end, found {list(value)}")
        return value


@register
class Stack(GrowMethod):
    """Slices of layers one upon another, as SOLAR's depth up-scaling and mergekit's `passthrough` do (Kim et al. 2023, SOLAR).

    Not the same function: the result wants further training. A layer's first place in the new order keeps its bricks, repeats are new.
    """

    paper = "Kim et al. 2023, SOLAR 10.7B: Depth Up-Scaling, arXiv 2312.15166"
    formula = "layers [a, b), [c, d), ... of the model one upon another; tensors times `scale`"
    preserves: ClassVar[Preserves] = "no"

    grow: Literal["stack"]
    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    """The slices, from below: [{layers: [0, 24]}, {layers: [8, 32]}]."""
    order: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Instead of `slices`: the layers one by one, [0, 1, 2, 1, 2, 3]."""

    @model_validator(mode="after")
    def _one(self) -> Stack:
        if (self.slices is None) == (self.order is None):
            raise ValueError(
                "expected one of `slices: [{layers: [0, 24]}, ...]` and `order: [0, 1, 1]`, found "
                + ("none" if self.slices is None else "both")
            )
        return self

    def learning(self) -> Learns:
        """After one step where a factor is 0, as in LLaMA Pro's files: such tensors get a gradient first, those behind them later."""
        zero = any(factor == 0 for s in self.slices or () for factor in s.scale.values())
        return "after_one_step" if zero else self.learns

    def places(self, depth: int) -> list[tuple[int, dict[str, float]]]:
        """For each new layer the old one, and its factors. Errors: out of range."""
        slices = self.slices or ()
        # Ends first: a slice up to 2³¹ would be written out as a list.
        if far := [s.layers[1] - 1 for s in slices if s.layers[1] > depth]:
            raise WorkbenchError(f"grow stack: layer {far[0]} does not exist; the model has 0..{depth - 1}", None, 2)
        found = [(i, s.scale) for s in slices for i in range(*s.layers)] or [(i, {}) for i in self.order or ()]
        if bad := [i for i, _ in found if not 0 <= i < depth]:
            raise WorkbenchError(f"grow stack: layer {bad[0]} does not exist; the model has 0..{depth - 1}", None, 2)
        return found

    def expand(self, model: Model) -> Growth:
        """Copies of whole layers. Errors: out of range, a factor that no tensor of its slice has."""
        layout = model.layout
        places = self.places(layout.depth)
        order = [old for old, _ in places]
        first = {old: new for new, old in reversed(list(enumerate(order)))}
        unused = {(new, glob) for new, (_, scale) in enumerate(places) for glob in scale}

        def make(name: str, new: int) -> Grown:
            inside = name.removeprefix(f"{layout.prefix}{order[new]}.")
            matching = next((glob for glob in places[new][1] if fnmatchcase(inside, glob)), None)
            unused.discard((new, matching or ""))
            factor = 1.0 if matching is None else places[new][1][matching]
            return Grown(name, new=first[order[new]] != new, scale=factor)

        tensors = in_order(layout, order, make)
        if unused:
            new, glob = min(unused)
            raise WorkbenchError(
                f"grow stack: `scale` names {glob}, which no tensor of layer {order[new]} matches",
                f"In a layer: {', '.join(n.removeprefix(f'{layout.prefix}0.') for n in layout.in_layer(0)[:6])}.",
                2,
            )
        gone = sorted(set(range(layout.depth)) - set(order))
        return Growth(
            tensors,
            reordered(model.config, layout.depth, order, "stack"),
            {"order": order, "new_layers": [n for n, old in enumerate(order) if first[old] != n], "gone_layers": gone},
        )
