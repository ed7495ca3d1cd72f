"""MEMIT: write many facts at once by ridge regression against ordinary text."""

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
class Memit(ClosedForm):
    """Least squares between the values of the facts and the outputs on ordinary text (Meng et al. 2023).

    Keys that are already written get a term of their own; facts about one subject share a value.
    """

    paper = "Meng et al. 2023, MEMIT, arXiv 2210.07229"
    formula = "ΔW = R Kᵀ (λC + K₁K₁ᵀ + KKᵀ)⁻¹"

    edit: Literal["memit"]
    lam: Real = Field(0.05, alias="lambda", gt=0)
    """Weight of ordinary text against facts, relative to the number of inputs d of the projection: the λ of the paper is this
    value times d."""

    def metric(self, moments: Moments) -> KeyMetric:
        """Return (λ d C)⁻¹."""
        return of_moments(moments, self.lam, 0.0)
