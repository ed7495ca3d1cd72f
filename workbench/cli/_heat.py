"""A brick's measures on the terminal: totals, and a table of layers by kinds of module whose cells are tinted by their value."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from workbench.cli._output import out

if TYPE_CHECKING:
    from workbench.measure import Measures, Sums

METRICS = ("relative", "norm", "zeros", "cosine", "conflict", "overlap")
WORDS = {
    "relative": "‖Δ‖ / ‖θ₀‖, %", "norm": "‖Δ‖", "zeros": "exact zeros, %", "cosine": "cosine", "conflict": "opposite signs, %",
    "overlap": "overlap of subspaces, %",
}  # fmt: skip
_LOW, _HIGH, _OTHER = (222, 235, 247), (33, 102, 172), (178, 88, 6)


def totals(name: str, measures: Measures) -> None:
    """One line a brick: its whole delta, and how it meets the first."""
    found = measures.total.document()
    others = found["others"]
    columns = ["brick", "norm", "relative", "zeros"] + (
        ["cosine", "conflict", "overlap out", "overlap in", "by chance"] if others else []
    )
    rows = [[name, *_own(found), *[""] * (len(columns) - 4)]]
    for other, m in others.items():
        meeting = [_percent(m[key]) for key in ("conflict", "overlap_out", "overlap_in", "chance")]
        rows.append([other, *_own(m), _text("cosine", m["cosine"]), *meeting])
    out.table(columns, rows, right=range(1, len(columns)))


def _own(found: dict[str, Any]) -> list[str]:
    return [_text("norm", found["norm"]), _percent(found["relative"]), _percent(found["zeros"])]


def table(measures: Measures, metric: str, other: str | None = None) -> None:
    """Layers by kinds of module, one metric; what stands outside the layers below."""
    shown = [
        kind
        for kind in measures.kinds
        if any(_value(s, metric, other) is not None for (_, k), s in measures.cells.items() if k == kind)
    ]
    values = [v for s in measures.cells.values() if (v := _value(s, metric, other)) is not None]
    top = 1.0 if metric in ("cosine", "conflict", "overlap", "zeros") else max(values, default=1.0) or 1.0
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column("layer")
    for kind in shown:
        grid.add_column(short(kind), justify="right", no_wrap=True)
    grid.add_column("all", justify="right")
    for layer, sums in measures.layers.items():
        if layer is not None:
            cells = [measures.cells.get((layer, kind)) for kind in shown]
            grid.add_row(str(layer), *(_cell(c, metric, other, top) for c in cells), _cell(sums, metric, other, top))
    out.data.print(Text(WORDS[metric] + (f", {other}" if other else ""), style="bold"))
    if shown:
        out.data.print(grid)
    ends = [
        f"{end} {_text(metric, v)}"
        for end in measures.ends
        if (v := _value(measures.cells[None, end], metric, other)) is not None
    ]
    if ends:
        out.line("outside the layers: " + ", ".join(ends))


def short(kind: str) -> str:
    """ "self_attn.q_proj" as columns call it: its last part."""
    return kind.rpartition(".")[2] if not kind.endswith(".bias") else ".".join(kind.split(".")[-2:])


def _value(sums: Sums | None, metric: str, other: str | None) -> float | None:
    if sums is None:
        return None
    document: dict[str, Any] = sums.document()
    found = document["others"].get(other, {}) if other and metric in ("cosine", "conflict", "overlap") else document
    return found.get(metric)


def _cell(sums: Sums | None, metric: str, other: str | None, top: float) -> Text:
    value = _value(sums, metric, other)
    if value is None:
        return Text("·", style="dim")
    share = min(1.0, abs(value) / top)
    high = _OTHER if metric == "conflict" or value < 0 else _HIGH
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_LOW, high, strict=True))
    style = f"{'bright_white' if share > 0.55 else 'black'} on rgb({red},{green},{blue})" if sys.stdout.isatty() else ""
    return Text(f" {_text(metric, value)}", style=style)


def _text(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric == "norm":
        return f"{value:.3g}"
    return f"{value:+.2f}".replace("-0.00", "+0.00") if metric == "cosine" else f"{100 * value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
