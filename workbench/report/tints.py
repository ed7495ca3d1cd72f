"""Color scales of heat maps that do not depend on the values shown, with a neutral color for values that say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.ground.numbers import figures
from workbench.ground.tables import Cell

if TYPE_CHECKING:
    from workbench.merge.measuring.delta_sums import DeltaSums

PALEST, DARKEST = 0.12, 0.7


@dataclass(frozen=True)
class Stop:
    """A value in the legend of a heat map, with the tint that cells of this value have.

    Attributes:
        text: The value.
        kind: Style class: "up" above the middle, "down" below.
        tint: Strength of the tint, 0 to 1.
    """

    text: str
    kind: str
    tint: float


@dataclass(frozen=True)
class TintScale:
    """A fixed scale from values to tints.

    Attributes:
        stops: Values that the legend shows.
        top: Distance from the middle that has the darkest tint; larger distances have it too.
        middle: Value without a tint.
        bend: Growth of the tint with the distance: in proportion to it, to its square root, or to its logarithm above `first`.
        first: Distance up to which a value has no tint on a logarithmic scale.
        reversed: Values above the middle are bad and have the style class "down".
    """

    stops: Sequence[float]
    top: float = 1.0
    middle: float = 0.0
    bend: Literal["linear", "root", "log"] = "linear"
    first: float = 0.0
    reversed: bool = False

    def tint(self, value: float) -> float:
        """Return the strength of a value's tint, from PALEST to DARKEST; NaN has the palest."""
        distance = abs(value - self.middle)
        if math.isnan(distance):
            return PALEST
        share = min(1.0, distance / self.top)
        if self.bend == "root":
            share = math.sqrt(share)
        elif self.bend == "log":
            share = max(0.0, 1.0 - math.log(share) / math.log(self.first / self.top)) if share > 0 else 0.0
        return round(PALEST + (DARKEST - PALEST) * share, 3)

    def darkness(self, value: float) -> float:
        """Return a value's tint as a share of the way from PALEST to DARKEST."""
        return (self.tint(value) - PALEST) / (DARKEST - PALEST)

    def kind(self, value: float) -> str:
        """Return the style class of a value: "up" is blue, "down" is orange."""
        return "up" if (value >= self.middle) != self.reversed else "down"

    def small(self, value: float) -> bool:
        """Return True if a value is too close to the middle for a tint on a logarithmic scale."""
        return self.bend == "log" and abs(value - self.middle) < self.first

    def legend(self, text: Callable[[float], str]) -> list[Stop]:
        """Return the stops of the legend.

        Args:
            text: Format of a value.
        """
        return [Stop(text(value), self.kind(value), self.tint(value)) for value in self.stops]


BFLOAT16 = 0.002
"""Relative norm of the change that rounding weights to bfloat16 makes, rounded up (about 0.17 % for normally distributed weights)."""
SCALES = {
    "relative": TintScale((0.002, 0.01, 0.05, 0.2, 1.0), bend="log", first=BFLOAT16),
    "norm": TintScale((0.01, 0.1, 1.0, 10.0, 100.0), top=100.0, bend="log", first=0.01),
    "zeros": TintScale((0.1, 0.25, 0.5, 1.0)),
    "cosine": TintScale((-1.0, -0.5, -0.1, 0.1, 0.5, 1.0), bend="root"),
    "conflict": TintScale((0.0, 0.25, 0.45, 0.55, 0.75, 1.0), top=0.5, middle=0.5, bend="root", reversed=True),
    "overlap": TintScale((0.02, 0.1, 0.3, 1.0), bend="root"),
    "recovered": TintScale((-1.0, -0.5, 0.25, 0.5, 1.0)),
}
"""Scales of the measures of bricks and of causal traces, by measure."""
SHARES = TintScale((0.1, 0.25, 0.5, 1.0))
"""Scale of shares and scores from 0 to 1."""
CHANGES = TintScale((-10.0, 1.0, 10.0, 100.0, 1000.0), top=1000.0, bend="log", first=1.0)
"""Scale of changes in percent."""
DIFFERENCE = TintScale((-1.0, -0.25, -0.05, 0.05, 0.25, 1.0), bend="root")
"""Scale of differences between scores: up to 100 points, or up to the score that they are compared with for metrics in their own unit."""


def inside(value: float, band: tuple[float, float] | None) -> bool:
    """Return True if a value lies in the band of values that chance explains."""
    return band is not None and band[0] <= value <= band[1]


def measured(sums: DeltaSums, key: str, other: str | None = None) -> float | None:
    """Return a measure of a brick, or of its similarity to another brick; None if it is undefined."""
    found = sums.measured()
    value: float | None = getattr(found.others.get(other) if other else found, key, None)
    return value


def null_reason(sums: DeltaSums, key: str, value: float, other: str | None = None) -> str | None:
    """Return the reason why a measure of a brick says nothing, or None.

    Args:
        sums: The measures.
        key: "relative", "cosine", "conflict", "overlap" or another measure.
        value: The value of the measure.
        other: The brick that it compares with.
    """
    if key == "relative":
        return "no more than rounding to bfloat16 changes" if SCALES[key].small(value) else None
    meeting = sums.meetings.get(other) if other else None
    band = meeting.by_chance(sums.square).get(key) if meeting else None
    if band is None:
        return None
    if key == "overlap":
        return f"unrelated deltas have up to {100 * band[1]:.2g} %" if value <= band[1] else None
    if not inside(value, band):
        return None
    low, high = (figures(end, 2, plus=True) if key == "cosine" else f"{100 * end:.3g} %" for end in band)
    return f"95 % of unrelated deltas have {low} to {high}"


@dataclass(frozen=True)
class TintedCell:
    """A number with its tint.

    Attributes:
        text: The number.
        tint: Strength of the tint, 0 to 1.
        kind: Style class: "up", "down", or "null" for a number that says nothing.
        own: Whether the cell lies on the diagonal.
        tip: Hover text.
        value: The number in full precision.
    """

    text: str
    tint: float
    kind: str
    own: bool
    tip: str
    value: float


@dataclass(frozen=True)
class TintedTable:
    """A matrix of tinted numbers.

    Attributes:
        title: Heading.
        caption: Sentence below the heading.
        corner: Text of the upper left cell: what the rows are.
        columns: Heads of the columns.
        rows: Head and cells of each row.
        stops: Values of the legend with their tints.
        neutral: Meaning of gray cells; empty if there are none.
        unit: Unit of the values.
    """

    title: str
    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[TintedCell]]]
    stops: Sequence[Stop]
    neutral: str
    unit: str

    @property
    def cells(self) -> list[list[str]]:
        """The rows as cells of a table that is saved."""
        return [
            [name, *(Cell(c.text, {"": None if math.isnan(c.value) else c.value}, self.unit) for c in row)]
            for name, row in self.rows
        ]


@dataclass(frozen=True)
class Tints:
    """How the numbers of a matrix are written and tinted.

    Attributes:
        text: Format of a value.
        unit: Unit in hover texts.
        scale: Fixed scale of the tints.
        neutral: Meaning of gray cells.
        band: Range of values that say nothing by (row, column), as positions; None where no range is known.
    """

    text: Callable[[float], str]
    scale: TintScale
    unit: str = ""
    neutral: str = ""
    band: Callable[[int, int], tuple[float, float] | None] = lambda row, column: None


def tinted(
    title: str, caption: str, corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], tints: Tints
) -> TintedTable:
    """Return a matrix of numbers whose tints are on a fixed scale; numbers that say nothing are gray.

    Args:
        title: Heading.
        caption: Sentence below the heading.
        corner: Text of the upper left cell.
        columns: Heads of the columns.
        rows: Head and values of each row.
        tints: How the values are written and tinted.
    """
    drawn = []
    for i, (name, values) in enumerate(rows):
        cells = []
        for j, (column, value) in enumerate(zip(columns, values, strict=True)):
            null = inside(value, tints.band(i, j)) or tints.scale.small(value)
            tip = f"{corner} {name}, {column}: {tints.text(value)}{tints.unit}" + (f"; gray: {tints.neutral}" if null else "")
            kind = "null" if null else tints.scale.kind(value)
            cells.append(
                TintedCell(tints.text(value), 0.0 if null else tints.scale.tint(value), kind, name == column, tip, value)
            )
        drawn.append((name, cells))
    neutral = tints.neutral if any(cell.kind == "null" for _, cells in drawn for cell in cells) else ""
    return TintedTable(title, caption, corner, columns, drawn, tints.scale.legend(tints.text), neutral, tints.unit.strip())
