"""WUDI: the delta that interferes least with every brick's, by the deltas alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

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


@register
class Wudi(MergeMethod):
    """Least interference with the rows of each brick's own delta, which stand for the inputs that the brick was trained on
    (Cheng et al. 2025, WUDI-Merging), in closed form: the published optimiser depends on the scale of the deltas. Weights of linear
    layers are solved; norms, biases, embeddings and a tied head are averaged by weight.

    The closed-form solution can be longer than the sum of the deltas and point in another direction, because it also fits directions in
    which the deltas have little energy. docs/merging.md states by how much on the starter bricks. Compare the result with
    `task_arithmetic` before you use it, or raise `ridge`."""

    paper = "Cheng et al. 2025, Whoever started the interference should end it, arXiv 2503.08099"
    formula = "Δ = λ (Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹,  Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖² + ε·I"
    laws = Laws(zero_is_base=False, passes=2, memory="tensor")

    merge: Literal["wudi"]
    bricks: Bricks[BrickEntry] | None = None
    """Brick name -> weight of its interference; a list of names gives each weight 1; omitted: all with weight 1. Only the ratios of weights matter."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    ridge: Real = Field(1e-3, ge=0)
    """Added to every Gram's diagonal, relative to the mean of their diagonals. Where deltas oppose each other in nearly the same rows,
    a smaller one lets rounding errors tell them apart and inflates the result: see `norm_ratio` in the run's record."""

    @model_validator(mode="after")
    def _weights(self) -> Wudi:
        not_negative(self.bricks)
        return self

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """The solver's."""
        return solver_bytes(model, tensor, bricks)

    def report(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Norms of the result."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Solve a linear layer, average anything else."""
        lam = group.value("lam")
        if not is_linear(group.model, group.tensor):
            return average(group, lam, method="wudi")
        deltas = linear_deltas(group)
        return merge_linear(group, deltas, [partial(own_gram, delta) for delta in deltas], self.ridge, lam, method="wudi")


def own_gram(delta: Tensor) -> Tensor:
    """τᵀτ / ‖τ‖² [in, in] of a delta [out, in], float64; zeros where the delta is 0."""
    wide = delta.double()
    mass = float(wide.square().sum())
    return (wide.T @ wide) / mass if mass else wide.T @ wide
