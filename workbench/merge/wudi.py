"""WUDI: the delta that interferes least with the bricks' deltas; it needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from workbench.merge.measuring.least_squares import (
    average,
    is_linear,
    linear_deltas,
    merge_linear,
    norm_report,
    not_negative,
    solver_bytes,
)
from workbench.models.layout import Model
from workbench.steps import Group, Laws, MergeMethod, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Real

if TYPE_CHECKING:
    from torch import Tensor


@register
class Wudi(MergeMethod):
    """The delta that interferes least with each brick's delta, in closed form (Cheng et al. 2025, WUDI-Merging).

    The rows of a brick's delta stand for the inputs that the brick was trained on. The published optimizer depends on the scale
    of the deltas; the closed form does not. The weights of linear layers are solved; norms, biases, embeddings and a tied head
    get the weighted mean.

    The closed-form solution can be longer than the sum of the deltas and point in another direction, because it also fits
    directions in which the deltas have little energy. docs/merging.md states by how much on the starter bricks. Compare the
    result with `task_arithmetic` before you use it, or raise `ridge`.
    """

    paper = "Cheng et al. 2025, Whoever started the interference should end it, arXiv 2503.08099"
    formula = "Δ = λ (Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹,  Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖² + ε·I"
    laws = Laws(zero_is_base=False, passes=2, memory="tensor")

    merge: Literal["wudi"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to the weight of its interference. A list of names gives each brick weight 1; if omitted, all bricks
    get weight 1. Weights must be 0 or more, and only their ratios matter."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    ridge: Real = Field(1e-3, ge=0)
    """Value added to the diagonal of each Gram matrix, relative to the mean of the diagonals. If it is too small and two deltas
    are nearly opposite, rounding errors inflate the result: see `norm_ratio` in the run's record."""

    @model_validator(mode="after")
    def _check_weights(self) -> Wudi:
        not_negative(self.bricks)
        return self

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the solver's memory."""
        return solver_bytes(model, tensor, bricks)

    def report(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the norms of the solved tensors and the number of averaged ones."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Solve a linear layer; average any other tensor."""
        lam = group.value("lam")
        if not is_linear(group.model, group.tensor):
            return average(group, lam, method="wudi")
        deltas = linear_deltas(group)
        return merge_linear(group, deltas, [partial(own_gram, delta) for delta in deltas], self.ridge, lam, method="wudi")


def own_gram(delta: Tensor) -> Tensor:
    """Return τᵀτ / ‖τ‖² [in, in] of a delta [out, in] in float64, or zeros if the delta is zero."""
    delta64 = delta.double()
    norm_squared = float(delta64.square().sum())
    return (delta64.T @ delta64) / norm_squared if norm_squared else delta64.T @ delta64
