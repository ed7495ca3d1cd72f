"""Slerp: a point between two models on the great circle through them."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.steps import Combination, Group, Laws, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks
from workbench.weights import kernels

_OPPOSITE = 1e-5 - 1
"""Cosine below which the sums, parts of which are float32, do not tell the angle's sine, which divides the result, from 0."""
_SUM = "expected weights that add up to 1 (mergekit's t is the second one: 1 - t and t)"


@register
class Slerp(MergeMethod):
    """Spherical interpolation of two models' weights, tensor by tensor, without the base (mergekit's `slerp`).

    The direction is interpolated along the arc instead of the chord, so the norm does not shrink between models that differ a
    lot. The two weights add up to 1; mergekit's `t` is the second one. Tensors whose |cosine| exceeds `parallel` are averaged
    linearly.
    """

    paper = "Shoemake 1985, Animating rotation with quaternion curves; mergekit (Goddard et al. 2024, arXiv 2403.13257)"
    formula = "θ = sin(w₁φ)/sin(φ) · θ₁ + sin(w₂φ)/sin(φ) · θ₂,  φ = angle(θ₁, θ₂),  w₁ + w₂ = 1"
    laws = Laws(zero_is_base=False, permutation_invariant=True, single_is_identity=False, arity=(2, 2), passes=2)

    along_arc = True

    merge: Literal["slerp"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of the two bricks to their weights; if omitted, the recipe's two bricks with weight 0.5 each. To interpolate from
    the base, declare it as a brick: `checkpoint: BASE`."""
    parallel: float = Field(0.9995, ge=0, le=1)
    """Value of |cosine| above which the result is the linear mean, because the arc is nearly a line."""

    @model_validator(mode="after")
    def _check_weights(self) -> Slerp:
        weights = [w.weight if isinstance(w, BrickEntry) else w for w in (self.bricks or {}).values()]
        if len(weights) == 2 and all(isinstance(w, float) for w in weights) and abs(sum(weights) - 1) > 1e-6:  # type: ignore[arg-type]
            raise ValueError(f"{_SUM}, found {weights[0]:g} and {weights[1]:g}")
        return self

    def takes_arrays(self) -> bool:
        """Return True: products and sums are compiled loops."""
        return True

    def prepare(self, group: Group) -> Combination:
        """Measure the norms and the angle in one pass; return a linear combination of the two models."""
        first, second = group.values("weight") if self.bricks is not None else (0.5, 0.5)
        if abs(first + second - 1) > 1e-6:
            raise InvalidRecipeError(f"slerp at {group.tensor}: {_SUM}, found {first:g} and {second:g}")
        sums = [0.0, 0.0, 0.0]
        for rows_a, rows_b in group.models():
            sums = kernels.dots(rows_a, rows_b, sums)
        lengths, dot = math.sqrt(sums[0]) * math.sqrt(sums[1]), sums[2]
        cosine = dot / lengths if lengths > 0 else 1.0
        if not abs(cosine) <= self.parallel or not _OPPOSITE < cosine < 1:  # whatever `parallel` says
            return Combination([first, second])
        angle = math.acos(cosine)
        scales = [math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)]
        return Combination(scales, base=sum(scales) - 1)
