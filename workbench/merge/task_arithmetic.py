"""Task arithmetic: the base plus a scaled sum of task vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.steps import Combination, Group, Laws, OverlapWeighted, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space


@register
class TaskArithmetic(OverlapWeighted):
    """The base plus a scaled sum of deltas, never normalized (Ilharco et al. 2023). A negative weight subtracts a skill."""

    paper = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089"
    formula = "θ = θ₀ + λ Σ wᵢτᵢ"
    laws = Laws(linear_in_weight=True, spaces=("full", "core"), rotation_invariant=True, exact_rank=True)

    merge: Literal["task_arithmetic"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the sum."""

    space: Space = "full"
    """`full` merges whole deltas. `core` merges the small core matrices of adapters: the same result, kept as low-rank
    factors."""

    def takes_arrays(self) -> bool:
        """Return True: the sum is one compiled loop."""
        return True

    def prepare(self, group: Group) -> Combination:
        """Return the delta λ Σ wτ."""
        lam = group.value("lam")
        return Combination([lam * w for w in group.values("weight")])
