"""TIES: trim each delta, elect one sign per element, average the deltas that agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from workbench.merge.streaming.trim import joint_trims, selection_bytes, trims
from workbench.models.layout import Model
from workbench.steps import Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Share, Space
from workbench.weights.sparse import Selection, Trim, Vote


class TiesEntry(BrickEntry):
    """A brick's fields in a TIES step."""

    density: Share | None = None
    """Share of this brick's delta kept; omitted: the step's."""


@register
class Ties(MergeMethod):
    """Trim, elect sign, disjoint mean (Yadav et al. 2023, TIES-Merging).

    The default is the paper's algorithm with a threshold per tensor, as mergekit and PEFT take it. Variants:
    paper = {sign: mass, weigh: after, divide: count, threshold: model};
    mergekit = {sign: mass, weigh: before, divide: weight, threshold: tensor}.
    """

    paper = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
    formula = "θ = θ₀ + λ · mean over {i : sign(τ̂ᵢ) = γ} of wᵢτ̂ᵢ,  τ̂ = trim(τ, density),  γ = sign(Σ τ̂ᵢ)"
    laws = Laws(single_is_identity=False, passes=2, spaces=("full", "core"))

    merge: Literal["ties"]
    bricks: Bricks[TiesEntry] | None = None
    """Brick name -> weight, or {weight:, density:}; a list of names gives each weight 1; omitted: all with weight 1."""
    density: Share = 0.2
    """Share of each delta kept, by magnitude. Among equal magnitudes at the threshold, lower indices are kept."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    sign: Literal["mass", "frequency"] = "mass"
    """Elect the sign of the sum of the trimmed deltas (mass), or of the sum of their signs (frequency)."""
    weigh: Literal["before", "after"] = "after"
    """Whether weights count in the election (before), or only in the mean (after)."""
    divide: Literal["count", "weight"] = "count"
    """Divide by the number of agreeing bricks, or by the sum of their weights."""
    threshold: Literal["tensor", "model"] = "tensor"
    """Trim each tensor to `density`, or the whole delta by one threshold a brick (one more pass over all bricks)."""

    space: Space = "full"
    """Merge whole deltas, or the core matrices of adapters (core): trims and votes in the basis that the adapters share, which is another result."""

    @model_validator(mode="after")
    def _one_density(self) -> Ties:
        given = [
            self.density,
            *(e.density for e in (self.bricks or {}).values() if isinstance(e, TiesEntry) and e.density is not None),
        ]
        if self.threshold == "model" and not all(isinstance(d, float) for d in given):
            raise ValueError("`threshold: model` trims by one threshold a brick: expected a number as density, found a schedule")
        return self

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Counters and sample of one tensor's thresholds."""
        return selection_bytes(model.weights.specs[tensor].numel, bricks)

    def survey(self, groups: Iterable[Group]) -> list[Trim] | None:
        """Thresholds over the whole model, where the step asks for them."""
        if self.threshold == "tensor":
            return None
        return joint_trims(groups, next(iter(groups)).values("density"))

    def prepare(self, group: Group) -> Selection:
        """Find each brick's threshold; then elect and average block by block."""
        kept = group.survey or trims(group, group.values("density"))
        vote = Vote(self.weigh == "before", self.sign == "frequency", self.divide == "count")
        return Selection(kept, group.values("weight"), group.value("lam"), vote)
