"""Average: the mean of the bricks' weights."""

from __future__ import annotations

from typing import Literal

from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import Space


@register
class Average(MergeMethod):
    """The mean of the bricks' weights, without the base (Wortsman et al. 2022, uniform soup)."""

    paper = "Wortsman et al. 2022, Model soups, arXiv 2203.05482"
    formula = "θ = (1/T) Σ θᵢ"
    laws = Laws(
        zero_is_base=True,
        permutation_invariant=True,
        single_is_identity=True,
        spaces=("full", "core"),
        rotation_invariant=True,
        exact_rank=True,
    )

    merge: Literal["average"]
    bricks: tuple[str, ...] | None = None
    """Names of the bricks; if omitted, all bricks. `average` takes no weights: use `linear` or `task_arithmetic` to weight
    bricks."""

    space: Space = "full"
    """`full` merges whole deltas. `core` merges the small core matrices of adapters: the same result, kept as low-rank
    factors."""

    def takes_arrays(self) -> bool:
        """Return True: the sum is one compiled loop."""
        return True

    def prepare(self, group: Group) -> Combination:
        """Return the mean of the deltas: the mean of base + delta is the base plus the mean delta."""
        return Combination([1.0 / len(group.bricks)] * len(group.bricks))
