"""Measures of bricks on the terminal: tables of layers with cells colored by value."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from workbench.console.grid import Look, grid
from workbench.console.output import out
from workbench.ground.numbers import signed
from workbench.report.tints import SCALES, measured, null_reason

if TYPE_CHECKING:
    from workbench.merge.measuring.delta_sums import DeltaSums, Measures

MEETING = ("cosine", "conflict", "overlap")
WORDS = {
    "relative": "‖Δ‖ / ‖θ₀‖, %",
    "norm": "‖Δ‖",
    "zeros": "exact zeros, %",
    "cosine": "cosine",
    "conflict": "opposite signs, %",
    "overlap": "subspace overlap, %",
}
_GRAYS = {
    "relative": "no more than rounding to bfloat16 changes",
    **dict.fromkeys(MEETING, "no more than unrelated bricks of the same size have"),
}


def by_kind(measures: Measures, metric: str, other: str | None = None) -> None:
    """Print one metric as a table of layers by kinds of module, then its values outside the layers."""
    values = {place: value for place, sums in measures.cells.items() if (value := _value(sums, metric, other)) is not None}
    kinds = [kind for kind in measures.kinds if any(k == kind for _, k in values)]
    cells = {
        layer: {**{k: measures.cells.get((layer, k)) for k in kinds}, "all": sums} for layer, sums in measures.layers.items()
    }
    columns = {**{kind: _short(kind) for kind in kinds}, "all": "all"}
    title = WORDS[metric] + (f", {other}" if other else "")
    grid(
        title,
        columns,
        cells,
        lambda sums, _: _value(sums, metric, other),
        _look(metric),
        lambda sums, _: _null(sums, metric, other),
    )
    if ends := [f"{end} {_text(metric, values[None, end])}" for end in measures.ends if (None, end) in values]:
        out.line("outside the layers: " + ", ".join(ends))


def by_brick(measures: Measures, metric: str) -> None:
    """Print one metric between a brick and each of the others, as a table of layers by bricks."""
    others = list(measures.total.meetings)
    cells: dict[int | None, dict[str, DeltaSums | None]] = {
        layer: dict.fromkeys(others, sums) for layer, sums in measures.layers.items()
    }
    columns = {other: other for other in others}
    grid(
        WORDS[metric],
        columns,
        cells,
        lambda sums, other: _value(sums, metric, other),
        _look(metric),
        lambda sums, other: _null(sums, metric, other),
    )


def _null(sums: DeltaSums | None, metric: str, other: str | None) -> bool:
    """Return True if a measure is within what chance, or rounding, explains."""
    value = _value(sums, metric, other)
    return sums is not None and value is not None and null_reason(sums, metric, value, other) is not None


def _short(kind: str) -> str:
    """Return a module's name for a column: "q_proj" for "self_attn.q_proj"."""
    return kind.rpartition(".")[2] if not kind.endswith(".bias") else ".".join(kind.split(".")[-2:])


def _value(sums: DeltaSums | None, metric: str, other: str | None) -> float | None:
    return None if sums is None else measured(sums, metric, other if metric in MEETING else None)


def _look(metric: str) -> Look:
    """Return the number format and the color scale of a metric."""
    return Look(SCALES[metric], partial(_text, metric), _GRAYS.get(metric, ""))


def _text(metric: str, value: float) -> str:
    if metric == "norm":
        return f"{value:.3g}"
    if metric == "cosine":
        return signed(value, 3, minus="-")
    return f"{100 * value:.1f}" if metric in ("conflict", "zeros") or value >= 0.0995 else f"{100 * value:.2f}"
