"""Metrics of the closed-form editors, built from second moments.

Strengths are relative to the trace of C, so that they mean the same on every model. If attention sinks dominate C, the trace
excludes them (see `moments`).
"""

from __future__ import annotations

from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.solver import KeyMetric

FLOOR = 1e-7
"""Smallest eigenvalue of C, as a share of the mean one. Directions that the text never uses cannot be inverted."""


def of_moments(moments: Moments | None, strength: float, ridge: float) -> KeyMetric:
    """Return (λ d C + η tr(C) I)⁻¹.

    For a key k from ordinary text, kᵀC⁻¹k is about d. With λ = 1, a fact therefore weighs as much as d vectors of text in its own
    direction. MEMIT's λ is 15,000 to 20,000 on models with d of 6,400 to 16,384.

    Args:
        moments: Factored second moments C.
        strength: λ.
        ridge: η.
    """
    assert moments is not None, "the method asks for statistics"
    values = moments.values.clamp(min=FLOOR * moments.scale)
    return KeyMetric(moments.vectors, len(values) * (strength * values + ridge * moments.scale))


def of_null_space(moments: Moments | None, energy: float, ridge: float) -> KeyMetric:
    """Return U (L tr(C) I)⁻¹ Uᵀ over the eigenvectors U of C with the smallest eigenvalues.

    AlphaEdit's own threshold on eigenvalues is absolute (0.02); a share of the trace means the same on every model.

    Args:
        moments: Factored second moments C.
        energy: Share of C's trace in the directions U.
        ridge: L.
    """
    assert moments is not None, "the method asks for statistics"
    share = moments.values.cumsum(0) / moments.total
    count = max(1, int((share <= energy).sum()))
    basis = moments.vectors[:, :count]
    return KeyMetric(basis, moments.values.new_full((count,), ridge * moments.total))
