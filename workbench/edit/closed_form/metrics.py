"""Metrics of the closed-form editors, made of second moments. Strengths are relative to traces, so that they hold for every model;
where attention sinks dominate C, to the trace without them (`moments`)."""

from __future__ import annotations

from workbench.edit.closed_form.moments import Moments
from workbench.edit.closed_form.solver import KeyMetric

FLOOR = 1e-7
"""Smallest eigenvalue of C, as a share of the mean one: directions that the text never used cannot be inverted."""


def of_moments(moments: Moments | None, strength: float, ridge: float) -> KeyMetric:
    """(λ d C + η tr(C) I)⁻¹.

    kᵀC⁻¹k is about d for a key k like those of the text, so that λ = 1 weighs a fact like d vectors of text in its own direction:
    MEMIT's λ of 15,000 to 20,000 on models with d of 6,400 to 16,384.

    Args:
        moments: C, factored.
        strength: λ.
        ridge: η.
    """
    assert moments is not None, "the method asks for statistics"
    values = moments.values.clamp(min=FLOOR * moments.scale)
    return KeyMetric(moments.vectors, len(values) * (strength * values + ridge * moments.scale))


def of_null_space(moments: Moments | None, energy: float, ridge: float) -> KeyMetric:
    """U (L tr(C) I)⁻¹ Uᵀ over the eigenvectors U of C that carry the last `energy` of its trace.

    AlphaEdit's threshold on eigenvalues is absolute (0.02); a share of the trace means the same on every model.
    """
    assert moments is not None, "the method asks for statistics"
    share = moments.values.cumsum(0) / moments.total
    count = max(1, int((share <= energy).sum()))
    basis = moments.vectors[:, :count]
    return KeyMetric(basis, moments.values.new_full((count,), ridge * moments.total))
