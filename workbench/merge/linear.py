"""Linear: the weighted mean of the bricks' weights."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from workbench.ground.errors import WorkbenchError
from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Space


@register
class Linear(MergeMethod):
    """The weighted mean of the bricks' weights, without the base (mergekit's `linear`)."""

    paper = "Wortsman et al. 2022, Model soups, arXiv 2203.05482"
    formula = "θ = Σ wᵢθᵢ / Σ wᵢ"
    laws = Laws(zero_is_base=False, permutation_invariant=True, single_is_identity=True, spaces=("full", "core"))

    merge: Literal["linear"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    normalize: bool = True
    """Divide by the sum of the weights. If false, the result is Σ wᵢθᵢ, which scales the model by Σ wᵢ."""

    space: Space = "full"
    """`full` merges whole deltas. `core` merges the small core matrices of adapters: the same result, kept as low-rank factors;
    it requires `normalize: true`."""

    @model_validator(mode="after")
    def _check_space(self) -> Linear:
        if self.space == "core" and not self.normalize:
            raise ValueError("`normalize: false` scales the base, which the core space does not contain: use `space: full`")
        return self

    def moves_base(self) -> bool:
        """Return whether the step scales the base: without normalization Σ wᵢθ₀ is not θ₀."""
        return not self.normalize

    def takes_arrays(self) -> bool:
        """Return True: the sum is one compiled loop."""
        return True

    def prepare(self, group: Group) -> Combination:
        """Return the delta Σwτ / Σw, or Σwτ + (Σw − 1) θ₀ without normalization."""
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
