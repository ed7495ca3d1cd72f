"""ROME: give each fact's key exactly its value, with the smallest change to ordinary text."""

from __future__ import annotations

from typing import Literal

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.preset import of_moments
from workbench.edit.closed_form.solver import KeyMetric
from workbench.steps import register


@register
class Rome(ClosedForm):
    """Write each fact's value exactly, with the smallest change to the outputs on ordinary text (Meng et al. 2022, ROME).

    Numerator and denominator use the same key (Gupta et al. 2024, R-ROME). Several facts are solved together.
    """

    paper = "Meng et al. 2022, ROME, arXiv 2202.05262; Gupta et al. 2024, R-ROME, arXiv 2403.07175"
    formula = "ΔW = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹"

    edit: Literal["rome"]

    def metric(self, moments: Moments) -> KeyMetric:
        """Return (d C)⁻¹; its scale does not matter, because the ridge is 0."""
        return of_moments(moments, 1.0, 0.0)

    @property
    def spread_ridge(self) -> float:
        """A small ridge: the mean key gets its value exactly, the keys of single contexts nearly."""
        return 0.05

    @property
    def ridge(self) -> float:
        """0: values are written exactly."""
        return 0.0
