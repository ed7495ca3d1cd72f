"""ENCORE: MEMIT's least squares with a ridge on the weights, for long sequences of edits."""

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
class Encore(ClosedForm):
    """MEMIT with a penalty on the norm of the change; values stop when their target is the most probable (Gupta et al. 2025)."""

    paper = "Gupta et al. 2025, ENCORE, arXiv 2502.01636"
    formula = "ΔW = R Kᵀ (λC + ηI + K₁K₁ᵀ + KKᵀ)⁻¹"

    edit: Literal["encore"]
    lam: Real = Field(0.05, alias="lambda", gt=0)
    """Weight of text against facts, relative to the projection's inputs d."""
    eta: Real = Field(1e-4, ge=0)
    """Penalty on the change's norm, relative to the trace of C."""
    confidence: Real = Field(0.6, gt=0, lt=1)
    """Mean probability of the target at which a value is done: little more than the most probable."""

    def metric(self, moments: Moments | None, width: int) -> KeyMetric:
        """(λ d C + η I)⁻¹."""
        return of_moments(moments, self.lam, self.eta)

    def ridge(self, width: int) -> float:
        """1: a fact counts as one vector."""
        return 1.0
