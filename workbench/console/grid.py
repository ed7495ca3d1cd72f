"""Tables of layers on the terminal, with cells colored by value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rich.table import Table
from rich.text import Text

from workbench.console.output import out, shown
from workbench.ground.errors import printable

Cell = TypeVar("Cell")
_PALE, _BLUE, _ORANGE = (222, 235, 247), (33, 102, 172), (178, 88, 6)
_PALE_ORANGE, _GRAY = (253, 232, 214), (222, 224, 227)


class Scale(Protocol):
    """A color scale."""

    def darkness(self, value: float) -> float:
        """Return how dark a value is, from 0 to 1."""

    def kind(self, value: float) -> str:
        """Return "up" for a blue value, "down" for an orange one."""


@dataclass(frozen=True)
class Look:
    """Describe how the numbers of a grid are printed and colored.

    Attributes:
        scale: Scale of the colors.
        text: Format of a number.
        gray: What gray numbers say, for the line below the grid.
    """

    scale: Scale
    text: Callable[[float], str]
    gray: str = ""


def grid(
    title: str,
    columns: Mapping[str, str],
    cells: Mapping[int | None, Mapping[str, Cell]],
    value: Callable[[Cell, str], float | None],
    look: Look,
    null: Callable[[Cell, str], bool] = lambda cell, column: False,
) -> None:
    """Print a table of layers by columns, with one colored number per cell; the color scale does not depend on the numbers.

    Args:
        title: Line above the table.
        columns: Column -> its head.
        cells: Layer -> column -> cell. Cells outside the layers (key None) are skipped.
        value: Takes (cell, column) and returns the number; None is printed as a dot.
        look: Number format and color scale.
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
        table.add_row(str(layer), *_cells(row, look))
    out.data.print(Text(printable(title), style="bold"))
    if values:
        out.data.print(table)
        if sys.stdout.isatty() and any(gray for row in values.values() for _, gray in row):
            out.line(f"gray: {look.gray}")


def _cells(row: Sequence[tuple[float | None, bool]], look: Look) -> list[Text]:
    """Return colored cells: blue above the middle, orange below, gray for numbers that say nothing. Sign conflicts are reversed."""
    cells = []
    for value, null in row:
        if value is None:
            cells.append(Text("·", style="dim"))
            continue
        share = look.scale.darkness(value)
        low, high = (_PALE, _BLUE) if look.scale.kind(value) == "up" else (_PALE_ORANGE, _ORANGE)
        red, green, blue = _GRAY if null else (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
        ink = "bright_white" if share > 0.55 and not null else "black"
        style = f"{ink} on rgb({red},{green},{blue})" if sys.stdout.isatty() else ""
        cells.append(Text(f" {look.text(value)}", style=style))
    return cells
