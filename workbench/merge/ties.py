"""TIES: trim each delta, elect one sign per element, and average the deltas that agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from workbench.merge.streaming.trim import joint_trims, selection_bytes, trims
from workbench.models.layout import Model
from workbench.steps import Group, Laws, OverlapWeighted, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Share, Space
from workbench.weights.sparse import Selection, Trim, Vote


class TiesEntry(BrickEntry):
    """A brick's fields in a TIES step."""

    density: Share | None = None
    """Share of this brick's delta that is kept; if omitted, the step's `density`."""


@register
class Ties(OverlapWeighted):
    """Trim each delta, elect one sign per element, and average the deltas that agree (Yadav et al. 2023, TIES-Merging).

    The default is the paper's algorithm with one threshold per tensor, as in mergekit and PEFT. The paper's variant is
    {sign: mass, weigh: after, divide: count, threshold: model}; mergekit's is
    {sign: mass, weigh: before, divide: weight, threshold: tensor}.
    """

    paper = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
    formula = "θ = θ₀ + λ · mean over {i : sign(τ̂ᵢ) = γ} of wᵢτ̂ᵢ,  τ̂ = trim(τ, density),  γ = sign(Σ τ̂ᵢ)"
    laws = Laws(single_is_identity=False, passes=2, spaces=("full", "core"))

    merge: Literal["ties"]
    bricks: Bricks[TiesEntry] | None = None
    """Mapping of brick name to weight, or to {weight:, density:}. A list: each has weight 1. Default: all bricks."""
    density: Share = 0.2
    """Share of each delta that is kept: the elements of largest magnitude. Of equal magnitudes at the threshold, those with lower
    indices are kept."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    sign: Literal["mass", "frequency"] = "mass"
    """Election of the sign of an element: the sign of the sum of the trimmed deltas (`mass`), or of the sum of their signs
    (`frequency`)."""
    weigh: Literal["before", "after"] = "after"
    """Use of the bricks' weights: in the election and the mean (`before`), or only in the mean (`after`)."""
    divide: Literal["count", "weight"] = "count"
    """Divisor of the mean: the number of agreeing bricks (`count`) or the sum of their weights (`weight`). With `weights: auto` it is
    always `weight`: a mean of bricks of the same skill has the size of one of them already."""
    threshold: Literal["tensor", "model"] = "tensor"
    """`tensor` trims each tensor to `density`. `model` trims a brick's whole delta with one threshold, which reads all bricks
    once more."""

    space: Space = "full"
    """`full` merges whole deltas. `core` merges the small core matrices of adapters, which trims and votes in the adapters'
    common basis and gives a different result."""

    @model_validator(mode="before")
    @classmethod
    def _auto_divides_by_weight(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("weights") != "auto":
            return fields
        if fields.get("divide") == "count":
            raise ValueError(
                "`weights: auto` with `divide: count` would take what bricks have in common away twice: leave out `divide`, or write `divide: weight`"
            )
        return {"divide": "weight", **fields}

    @model_validator(mode="after")
    def _one_density(self) -> Ties:
        densities = [
            self.density,
            *(e.density for e in (self.bricks or {}).values() if isinstance(e, TiesEntry) and e.density is not None),
        ]
        if self.threshold == "model" and not all(isinstance(d, float) for d in densities):
            raise ValueError("`threshold: model` uses one threshold per brick: expected a number as `density`, found a schedule")
        return self

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the memory for the counters and the sample that find one tensor's thresholds."""
        return selection_bytes(model.weights.specs[tensor].numel, bricks)

    def survey(self, groups: Iterable[Group]) -> list[Trim] | None:
        """Return one threshold per brick over the whole model, or None if the step trims tensor by tensor."""
        if self.threshold == "tensor":
            return None
        return joint_trims(groups, next(iter(groups)).values("density"))

    def takes_arrays(self) -> bool:
        """Return True unless one threshold covers the whole model, because torch then counts all magnitudes."""
        return self.threshold == "tensor"

    def prepare(self, group: Group) -> Selection:
        """Find each brick's threshold; return a selection that elects and averages block by block."""
        thresholds = group.survey or trims(group, group.values("density"))
        vote = Vote(self.weigh == "before", self.sign == "frequency", self.divide == "count")
        return Selection(thresholds, group.values("weight"), group.value("lam"), vote)
