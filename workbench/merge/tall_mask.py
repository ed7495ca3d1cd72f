"""TALL masks: the sum of the deltas, limited to the elements that one brick uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.merge.measuring.matrices import is_used, masked_sum
from workbench.steps import Block, Group, Laws, MergeMethod, Problem, register
from workbench.steps.fields import BrickEntry, Bricks, Number, lowest

if TYPE_CHECKING:
    from torch import Tensor


@register
class TallMask(MergeMethod):
    """The sum of the deltas, specialized for one brick by a mask (Wang et al. 2024, TALL masks).

    An element belongs to the brick if its own delta is large compared with what the other bricks add there. The method shows how
    much of each brick a sum still contains, and compresses many fine-tunes into one merge with one mask per brick. For a model with
    all skills at once, use `consensus`.
    """

    paper = "Wang et al. 2024, Localizing Task Information, arXiv 2405.07813"
    formula = "θ = θ₀ + λ · mₜ ⊙ τ_mt,  τ_mt = Σ wᵢτᵢ,  mₜ = 1[|wₜτₜ| ≥ threshold · |τ_mt − wₜτₜ|]"
    laws = Laws(permutation_invariant=False, linear_in_weight=True)

    merge: Literal["tall_mask"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    brick: str | None = None
    """The brick that the result is specialized for; if omitted, the first one."""
    threshold: Number = 0.4
    """λₜ of the paper: how large the brick's delta must be, relative to the sum of the others. The paper chooses it among 0.2 to 0.6
    on held-out data. 0 keeps the whole sum."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the masked sum."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error if `brick` is none of the step's bricks, or the threshold is negative."""
        yield from super().check_names(names, known)
        if self.brick is not None and self.brick not in names:
            message = f"expected one of the step's bricks ({', '.join(names)}), found '{self.brick}'"
            yield Problem(("brick",), message, "Name a brick that the step merges.")
        if lowest(self.threshold) < 0:
            yield Problem(("threshold",), "expected a threshold of 0 or more", None)

    def prepare(self, group: Group) -> Callable[[Block], Tensor]:
        """Return the function that masks the sum of a block."""
        place = group.bricks.index(self.brick) if self.brick is not None else 0
        threshold = group.value("threshold")
        return masked_sum(
            group.values("weight"), lambda deltas, total: is_used(deltas[place], total, threshold), group.value("lam")
        )
