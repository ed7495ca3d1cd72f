"""EMMET: many facts with equality constraints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.metrics import of_moments
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.steps import register
from workbench.steps.fields import Real


@register
class Emmet(ClosedForm):
    """Values written as equalities, softened by a ridge on the keys' Gram matrix (Gupta et al. 2024)."""

    paper = "Gupta et al. 2024, EMMET, arXiv 2403.14236"
    formula = "ΔW = R (KᵀC⁻¹K + μI)⁻¹ KᵀC⁻¹"

    edit: Literal["emmet"]
    mu: Real = Field(0.02, ge=0)
    """Ridge, relative to the projection's inputs d, which kᵀC⁻¹k is about."""

    def metric(self, moments: Moments | None, width: int) -> KeyMetric:
        """(d C)⁻¹, in which a key like those of the text has kᵀG k = 1."""
        return of_moments(moments, 1.0, 0.0)

    def ridge(self, width: int) -> float:
        """μ: relative to that."""
        return self.mu
