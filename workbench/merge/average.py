"""Average: the mean of the bricks' weights."""

from __future__ import annotations

from typing import Literal

from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import Space


@register
class Average(MergeMethod):
    """The mean of the bricks' weights, the base left out (Wortsman et al. 2022, uniform soup)."""

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
    """Names of the bricks; omitted: all. An average has no weights: use `linear` or `task_arithmetic` for them."""

    space: Space = "full"
    """Merge whole deltas, or the core matrices of adapters (core): the same numbers, kept as factors."""

    def prepare(self, group: Group) -> Combination:
        """Mean of the deltas: the base's share in the mean of the models is the base itself."""
        return Combination([1.0 / len(group.bricks)] * len(group.bricks))
