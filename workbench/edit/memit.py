"""MEMIT: many facts at once, by ridge regression against text."""

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
class Memit(ClosedForm):
    """Least squares between the facts' values and what text reads (Meng et al. 2023), with a term for keys that are written
    already; facts of one subject share a value."""

    paper = "Meng et al. 2023, MEMIT, arXiv 2210.07229"
    formula = "ΔW = R Kᵀ (λC + K₁K₁ᵀ + KKᵀ)⁻¹"

    edit: Literal["memit"]
    lam: Real = Field(0.05, alias="lambda", gt=0)
    """Weight of text against facts, relative to the projection's inputs d: MEMIT's own λ is this times d."""

    def metric(self, moments: Moments | None, width: int) -> KeyMetric:
        """(λ d C)⁻¹."""
        return of_moments(moments, self.lam, 0.0)

    def ridge(self, width: int) -> float:
        """1: a fact counts as one vector."""
        return 1.0
