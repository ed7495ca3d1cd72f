"""Task arithmetic: the base plus a scaled sum of task vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space


@register
class TaskArithmetic(MergeMethod):
    """The base plus a scaled sum of deltas, never normalised (Ilharco et al. 2023). Negative weights subtract a skill."""

    paper = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089"
    formula = "θ = θ₀ + λ Σ wᵢτᵢ"
    laws = Laws(linear_in_weight=True, spaces=("full", "core"), rotation_invariant=True, exact_rank=True)

    merge: Literal["task_arithmetic"]
    bricks: Bricks[BrickEntry] | None = None
    """Brick name -> weight; a list of names gives each weight 1; omitted: all with weight 1."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the sum."""

    space: Space = "full"
    """Merge whole deltas, or the core matrices of adapters (core): the same numbers, kept as factors."""

    def prepare(self, group: Group) -> Combination:
        """λ Σ wτ."""
        lam = group.value("lam")
        return Combination([lam * w for w in group.values("weight")])
