"""Measures of bricks on the terminal: tables of layers with cells colored by value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table
from rich.text import Text

from workbench.cli._output import out, shown
from workbench.ground.errors import printable

if TYPE_CHECKING:
    from workbench.merge.measuring.delta_sums import DeltaSums, Measures

Cell = TypeVar("Cell")
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
    "recovered": "the 95 % interval over facts includes 0",
}
_PALE, _BLUE, _ORANGE = (222, 235, 247), (33, 102, 172), (178, 88, 6)
_PALE_ORANGE, _GRAY = (253, 232, 214), (222, 224, 227)


def by_kind(measures: Measures, metric: str, other: str | None = None) -> None:
    """Print one metric as a table of layers by kinds of module, then its values outside the layers."""
    values = {place: value for place, sums in measures.cells.items() if (value := _value(sums, metric, other)) is not None}
    kinds = [kind for kind in measures.kinds if any(k == kind for _, k in values)]
    cells = {
        layer: {**{k: measures.cells.get((layer, k)) for k in kinds}, "all": sums} for layer, sums in measures.layers.items()
    }
    columns = {**{kind: _short(kind) for kind in kinds}, "all": "all"}
    title = WORDS[metric] + (f", {other}" if other else "")
    grid(title, columns, cells, lambda sums, _: _value(sums, metric, other), metric, lambda sums, _: _null(sums, metric, other))
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
        metric,
        lambda sums, other: _null(sums, metric, other),
    )


def grid(
    title: str,
    columns: Mapping[str, str],
    cells: Mapping[int | None, Mapping[str, Cell]],
    value: Callable[[Cell, str], float | None],
    metric: str,
    null: Callable[[Cell, str], bool] = lambda cell, column: False,
) -> None:
    """Print a table of layers by columns, with one colored number per cell; the color scale does not depend on the numbers.

    Args:
        title: Line above the table.
        columns: Column -> its head.
        cells: Layer -> column -> cell. Cells outside the layers (key None) are skipped.
        value: Takes (cell, column) and returns the number; None is printed as a dot.
        metric: Metric, which decides the number format and the color scale.
        null: Takes (cell, column) and returns True for a number that says nothing, which is gray.
    """
    values = {
        layer: [(value(row[column], column), null(row[column], column)) for column in columns]
        for layer, row in cells.items()
        if layer is not None
    }
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer")
    for head in columns.values():
        table.add_column(shown(head), justify="right", no_wrap=True)
    for layer, row in values.items():
        table.add_row(str(layer), *_cells(row, metric))
    out.data.print(Text(printable(title), style="bold"))
    if values:
        out.data.print(table)
        if sys.stdout.isatty() and any(gray for row in values.values() for _, gray in row):
            out.line(f"gray: {_GRAYS[metric]}")


def _cells(row: Sequence[tuple[float | None, bool]], metric: str) -> list[Text]:
    """Return colored cells: blue above the middle, orange below, gray for numbers that say nothing. Sign conflicts are reversed."""
    from workbench.report.tints import DARKEST, PALEST, SCALES

    scale, cells = SCALES[metric], []
    for value, null in row:
        if value is None:
            cells.append(Text("·", style="dim"))
            continue
        share = (scale.tint(value) - PALEST) / (DARKEST - PALEST)
        low, high = (_PALE, _BLUE) if scale.kind(value) == "up" else (_PALE_ORANGE, _ORANGE)
        red, green, blue = _GRAY if null else (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
        ink = "bright_white" if share > 0.55 and not null else "black"
        style = f"{ink} on rgb({red},{green},{blue})" if sys.stdout.isatty() else ""
        cells.append(Text(f" {_text(metric, value)}", style=style))
    return cells


def _null(sums: DeltaSums | None, metric: str, other: str | None) -> bool:
    """Return True if a measure is within what chance, or rounding, explains."""
    from workbench.report.tints import null_reason

    value = _value(sums, metric, other)
    return sums is not None and value is not None and null_reason(sums, metric, value, other) is not None


def _short(kind: str) -> str:
    """Return a module's name for a column: "q_proj" for "self_attn.q_proj"."""
    return kind.rpartition(".")[2] if not kind.endswith(".bias") else ".".join(kind.split(".")[-2:])


def _value(sums: DeltaSums | None, metric: str, other: str | None) -> float | None:
    from workbench.report.tints import measured

    return None if sums is None else measured(sums, metric, other if metric in MEETING else None)


def _text(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric == "norm":
        return f"{value:.3g}"
    if metric == "cosine":
        return f"{value:+.3f}".replace("-0.000", "0.000").replace("+0.000", "0.000")
    if metric == "recovered":
        return f"{round(100 * value, 1) + 0.0:.1f}"  # no "-0.0"
    return f"{100 * value:.1f}" if metric in ("conflict", "zeros") or value >= 0.0995 else f"{100 * value:.2f}"
