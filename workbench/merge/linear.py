"""Linear: the weighted mean of the bricks' weights."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from workbench.errors import WorkbenchError
from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Space


@register
class Linear(MergeMethod):
    """The weighted mean of the bricks' weights, the base left out (mergekit's `linear`)."""

    paper = "Wortsman et al. 2022, Model soups, arXiv 2203.05482"
    formula = "θ = Σ wᵢθᵢ / Σ wᵢ"
    laws = Laws(zero_is_base=False, permutation_invariant=True, single_is_identity=True, spaces=("full", "core"))

    merge: Literal["linear"]
    bricks: Bricks[BrickEntry] | None = None
    """Brick name -> weight; a list of names gives each weight 1; omitted: all with weight 1."""
    normalize: bool = True
    """Divide by the sum of the weights. Without it the result is Σ wᵢθᵢ, whose scale is Σ wᵢ."""

    space: Space = "full"
    """Merge whole deltas, or the core matrices of adapters (core): the same numbers, kept as factors; needs `normalize: true`."""

    @model_validator(mode="after")
    def _span(self) -> Linear:
        if self.space == "core" and not self.normalize:
            raise ValueError("`normalize: false` scales the base, which the core space does not hold: use `space: full`")
        return self

    def moves_base(self) -> bool:
        """Σ wᵢθ₀ is not θ₀."""
        return not self.normalize

    def prepare(self, group: Group) -> Combination:
        """θ − θ0 = Σwτ / Σw, or Σwτ + (Σw − 1) θ0 without normalisation."""
        weights = group.values("weight")
        total = sum(weights)
        if not self.normalize:
            return Combination(weights, base=total - 1)
        if total == 0:
            raise WorkbenchError(
                f"linear: the weights sum to 0 at {group.tensor}",
                "Use `merge: task_arithmetic`, which does not divide, or set `normalize: false`.",
            )
        return Combination([w / total for w in weights])
