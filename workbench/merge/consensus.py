"""Consensus: the sum of the deltas, without the elements that too few bricks use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.ground.lazy import torch
from workbench.merge.measuring.matrices import is_used, masked_sum
from workbench.steps import Block, Group, Laws, MergeMethod, Problem, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Whole, lowest

if TYPE_CHECKING:
    from torch import Tensor


@register
class Consensus(MergeMethod):
    """The sum of the deltas on the elements that several bricks use (Wang et al. 2024, Consensus task arithmetic).

    A TALL mask tells which elements of the sum a brick uses. Elements that fewer than `least` bricks use return to the base. On
    bricks that share little, such as adapters of unrelated skills, this removes most of each skill: use `task_arithmetic` there.
    """

    paper = "Wang et al. 2024, Localizing Task Information, arXiv 2405.07813"
    formula = "θ = θ₀ + λ · 1[Σᵢ mᵢ ≥ least] ⊙ τ_mt,  τ_mt = Σ wᵢτᵢ,  mᵢ = 1[|wᵢτᵢ| ≥ threshold · |τ_mt − wᵢτᵢ|]"
    laws = Laws(single_is_identity=False, linear_in_weight=True, arity=(2, None))

    merge: Literal["consensus"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    least: Whole = Field(2, ge=1)
    """Number of bricks that must use an element. 1 removes only elements that no brick uses."""
    threshold: Number = 0.4
    """λₜ of the paper: how large a brick's delta must be, relative to the sum of the others, to count as used. The paper chooses it
    among 0.2 to 0.6 on held-out data."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the masked sum."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error if no element can have enough bricks, or the threshold is negative."""
        yield from super().check_names(names, known)
        if self.least > len(names) > 1:
            message = (
                f"{self.least} bricks must use an element, but the step merges {len(names)}, so the result would be the base"
            )
            yield Problem(("least",), message, f"Set least: {len(names)} or lower.")
        if lowest(self.threshold) < 0:
            yield Problem(("threshold",), "expected a threshold of 0 or more", None)

    def prepare(self, group: Group) -> Callable[[Block], Tensor]:
        """Return the function that counts the bricks that use each element of a block, and masks the sum."""
        threshold = group.value("threshold")

        def shared(deltas: list[Tensor], total: Tensor) -> Tensor:
            votes = torch.zeros_like(total)
            for delta in deltas:
                votes.add_(is_used(delta, total, threshold))
            return votes >= self.least

        return masked_sum(group.values("weight"), shared, group.value("lam"))
