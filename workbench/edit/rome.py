"""ROME: each fact's key gets exactly its value, with the smallest change on text."""

from __future__ import annotations

from typing import Literal

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.metrics import of_moments
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.steps import register


@register
class Rome(ClosedForm):
    """Write each fact's value exactly, changing least what other text reads (Meng et al. 2022), with one key in numerator and
    denominator (Gupta et al. 2024, R-ROME). Several facts are solved together."""

    paper = "Meng et al. 2022, ROME, arXiv 2202.05262; Gupta et al. 2024, R-ROME, arXiv 2403.07175"
    formula = "ΔW = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹"

    edit: Literal["rome"]

    def metric(self, moments: Moments | None, width: int) -> KeyMetric:
        """(d C)⁻¹: without a ridge its scale does not matter."""
        return of_moments(moments, 1.0, 0.0)

    def spread_ridge(self, width: int) -> float:
        """Small: the mean key gets its value exactly, the keys behind single contexts nearly."""
        return 0.05

    def ridge(self, width: int) -> float:
        """None: values are written exactly."""
        return 0.0
