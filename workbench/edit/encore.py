"""ENCORE: MEMIT's least squares with a ridge on the weights, for long sequences of edits."""

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
class Encore(ClosedForm):
    """MEMIT with a penalty on the norm of the update (Gupta et al. 2025).

    The optimization of a value stops as soon as its target is the most probable answer.
    """

    paper = "Gupta et al. 2025, ENCORE, arXiv 2502.01636"
    formula = "ΔW = R Kᵀ (λC + ηI + K₁K₁ᵀ + KKᵀ)⁻¹"

    edit: Literal["encore"]
    lam: Real = Field(0.05, alias="lambda", gt=0)
    """Weight of ordinary text against facts, relative to the number of inputs d of the projection."""
    eta: Real = Field(1e-4, ge=0)
    """Penalty on the norm of the update, relative to the trace of C."""
    confidence: Real = Field(0.6, gt=0, lt=1)
    """Mean probability of the target at which the optimization of a value stops. The default is just high enough to make the
    target the most probable answer."""

    def metric(self, moments: Moments) -> KeyMetric:
        """Return (λ d C + η I)⁻¹."""
        return of_moments(moments, self.lam, self.eta)
