"""AlphaEdit: write facts only into directions that ordinary text hardly uses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.preset import of_null_space
from workbench.edit.closed_form.solver import KeyMetric
from workbench.steps import register
from workbench.steps.fields import Real


@register
class AlphaEdit(ClosedForm):
    """Ridge regression within the span of C's smallest eigenvectors, with a term for already written keys (Fang et al. 2025)."""

    paper = "Fang et al. 2025, AlphaEdit, arXiv 2410.02355"
    formula = "ΔW = R KᵀP (P(KKᵀ + K₁K₁ᵀ)P + L I)⁻¹ P"

    edit: Literal["alphaedit"]
    energy: Real = Field(0.3, gt=0, le=1)
    """Largest share of C's trace in the directions that the edit may change."""
    l2: Real = Field(0.01, gt=0)
    """Ridge L, relative to the trace of C (the typical squared norm of a key)."""

    def metric(self, moments: Moments) -> KeyMetric:
        """Return U (L I)⁻¹ Uᵀ."""
        return of_null_space(moments, self.energy, self.l2)
