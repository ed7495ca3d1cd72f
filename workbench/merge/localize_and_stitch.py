"""Localize-and-Stitch without data: the largest elements of each delta, averaged where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from workbench.ground.lazy import torch
from workbench.merge.streaming.trim import joint_trims, selection_bytes, trims
from workbench.models.layout import Model
from workbench.steps import Block, Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Share
from workbench.weights.sparse import Trim, trimmed

if TYPE_CHECKING:
    from torch import Tensor


@register
class LocalizeAndStitch(MergeMethod):
    """The largest elements of each delta, divided by the number of bricks that claim an element (He et al. 2024, dataless variant).

    Each brick claims the elements of largest magnitude of its whole delta. Overlapping claims are averaged, whatever their signs.
    """

    paper = "He et al. 2024, Localize-and-Stitch, arXiv 2408.13656"
    formula = "θ = θ₀ + λ · Σ wᵢ mᵢ⊙τᵢ / Σ mᵢ,  mᵢ = 1[|τᵢ| is among the largest, by density, and not 0]"
    laws = Laws(single_is_identity=False, linear_in_weight=True, passes=3)

    merge: Literal["localize_and_stitch"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    density: Share = 0.1
    """Share of each delta that its brick claims. The paper's dataless variant uses 0.05 to 0.1."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    threshold: Literal["tensor", "model"] = "model"
    """`model` chooses the largest elements of a brick's whole delta, as in the paper. `tensor` chooses them tensor by tensor, which reads
    the bricks once less and allows a schedule as `density`."""

    @model_validator(mode="after")
    def _one_density(self) -> LocalizeAndStitch:
        if self.threshold == "model" and not isinstance(self.density, float):
            raise ValueError(
                "`threshold: model` uses one threshold per brick: expected a number as `density`, found a schedule; "
                "`threshold: tensor` accepts schedules"
            )
        return self

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the memory for the counters and the sample that find one tensor's thresholds."""
        return selection_bytes(model.weights.specs[tensor].numel, bricks) if self.threshold == "tensor" else 0

    def survey(self, groups: Iterable[Group]) -> list[Trim] | None:
        """Return one threshold per brick over the whole model, or None if the step trims tensor by tensor."""
        if self.threshold == "tensor":
            return None
        first = next(iter(groups))
        return joint_trims(groups, [first.value("density")] * len(first.bricks))

    def prepare(self, group: Group) -> Callable[[Block], Tensor]:
        """Return the function that trims and averages a block."""
        claims = group.survey or trims(group, [group.value("density")] * len(group.bricks))
        weights, lam = group.values("weight"), group.value("lam")
        left: list[int] = []

        def delta(block: Block) -> Tensor:
            if block.start == 0:
                left[:] = [claim.ties for claim in claims]
            total, count = torch.zeros_like(block.deltas[0]), torch.zeros_like(block.deltas[0])
            for i, (part, claim, weight) in enumerate(zip(block.deltas, claims, weights, strict=True)):
                if claim.threshold:
                    left[i] = trimmed(part, claim.threshold, left[i])
                count.add_(part != 0)
                total.add_(part, alpha=weight)
            return total.div_(count.clamp_min_(1)).mul_(lam)

        return delta
