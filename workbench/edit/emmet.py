"""EMMET: write many facts with equality constraints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.preset import of_moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.steps import register
from workbench.steps.fields import Real


@register
class Emmet(ClosedForm):
    """Write values as equality constraints, softened by a ridge on the Gram matrix of the keys (Gupta et al. 2024)."""

    paper = "Gupta et al. 2024, EMMET, arXiv 2403.14236"
    formula = "ΔW = R (KᵀC⁻¹K + μI)⁻¹ KᵀC⁻¹"

    edit: Literal["emmet"]
    mu: Real = Field(0.02, ge=0)
    """Ridge μ, relative to the number of inputs d of the projection (the typical size of kᵀC⁻¹k)."""

    def metric(self, moments: Moments) -> KeyMetric:
        """Return (d C)⁻¹, under which kᵀG k is about 1 for a key from ordinary text."""
        return of_moments(moments, 1.0, 0.0)

    @property
    def ridge(self) -> float:
        """μ."""
        return self.mu
