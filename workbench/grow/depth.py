"""Depth: new layers that do not change the output until they are trained."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.grow.expansion.layers import in_order, reordered
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Grown, Growth, Learns, Preserves, register
from workbench.steps.fields import Whole


@register
class Depth(GrowMethod):
    """Insert copies of layers that leave the model's output unchanged (Wu et al. 2024, LLaMA Pro, section 3.2).

    Each copy follows its original. The tensors that write to the residual stream are set to zero in the copy, so that the grown
    model computes exactly the same function.
    """

    paper = "Wu et al. 2024, LLaMA Pro: Progressive LLaMA with block expansion, arXiv 2401.02415"
    formula = "layer i ↦ layer i, then a copy of it with W_o = 0 and W_down = 0, and their biases 0"
    preserves: ClassVar[Preserves] = "exact"
    learns: ClassVar[Learns] = "after_one_step"

    grow: Literal["depth"]
    blocks: Whole | None = Field(None, ge=1)
    """Number of new layers, spread evenly: the layers are divided into `blocks` groups, and the last layer of each is copied."""
    after: tuple[Whole, ...] | None = None
    """Instead of `blocks`: current indices of the layers to copy; negative indices count from the end."""

    @model_validator(mode="after")
    def _check_fields(self) -> Depth:
        if (self.blocks is None) == (self.after is None):
            raise ValueError(
                "expected one of `blocks: 4` and `after: [3, 7]`, found " + ("none" if self.after is None else "both")
            )
        return self

    def copied(self, depth: int) -> list[int]:
        """Return the indices of the layers to copy, in ascending order.

        Raises:
            WorkbenchError: If an index is out of range, or `blocks` exceeds the number of layers.
        """
        if self.after is not None:
            if bad := [i for i in self.after if not -depth <= i < depth]:
                raise InvalidRecipeError(f"grow depth: `after` names layer {bad[0]}; the model has layers 0..{depth - 1}")
            return sorted({i % depth for i in self.after})
        blocks = self.blocks or 0
        if blocks > depth:
            raise InvalidRecipeError(
                f"grow depth: `blocks: {blocks}` for a model of {depth} layers, expected at most one copy of each layer",
                f"Set `blocks: {depth}`, and add a second grow step for more.",
            )
        return [(i + 1) * depth // blocks - 1 for i in range(blocks)]

    def expand(self, model: Model) -> Growth:
        """Plan the grown model: a copy follows its original, and every layer moves up by the number of copies before it."""
        layout = model.layout
        copied = self.copied(layout.depth)
        order = [(i, copy) for i in range(layout.depth) for copy in ((False, True) if i in copied else (False,))]
        zero = {name for i in copied for name in layout.residual_writers(i)}
        tensors = in_order(
            layout,
            [old for old, _ in order],
            lambda name, new: Grown(name, new=order[new][1], zero=order[new][1] and name in zero),
        )
        return Growth(
            tensors,
            reordered(model.config, layout.depth, [old for old, _ in order], "depth"),
            {"copied_layers": copied, "new_layers": [n for n, (_, copy) in enumerate(order) if copy]},
        )
