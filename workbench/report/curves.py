"""Small line charts with shared scales, and tables of tinted numbers, for pages of analyses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.report.svg import joined, svg
from workbench.report.tints import Stop, TintScale, inside

WIDTH, HEIGHT = 268, 150
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 22


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: Name in hover texts.
        points: (x, y) in order of x.
        kind: Style class: "main", "second", "third" or "other".
        ends: Interval of each point; empty if there are none. Points with intervals are drawn as dots.
        tips: Hover text of each point; empty for the name with the value.
        line: Join the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str
    ends: Sequence[tuple[float, float] | None] = ()
    tips: Sequence[str] = ()
    line: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal dashed line at a value, such as a limit of chance.

    Attributes:
        name: Name in hover texts.
        value: The value.
        kind: Style class.
    """

    name: str
    value: float
    kind: str


@dataclass(frozen=True)
class Chart:
    """A chart with its heading.

    Attributes:
        title: Heading.
        note: Text beside the heading.
        drawing: The drawing.
    """

    title: str
    note: str
    drawing: Markup


@dataclass(frozen=True)
class Scales:
    """The ranges of both axes, shared by the charts of a group.

    Attributes:
        x: Lowest and highest x.
        y: Lowest and highest y.
        ticks: Values that the y axis names.
        marks: Values that the x axis names.
        text: Format of y values.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    ticks: Sequence[float]
    marks: Sequence[float]
    text: Callable[[float], str] = "{:g}".format
    x_text: Callable[[float], str] = "{:g}".format

    def across(self, value: float) -> float:
        """Return the horizontal position of an x value in pixels."""
        low, high = self.x
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1)

    def up(self, value: float) -> float:
        """Return the vertical position of a y value in pixels; values outside the range lie on its edge."""
        low, high = self.y
        share = min(1.0, max(0.0, (value - low) / ((high - low) or 1)))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def chart(
    title: str,
    curves: Sequence[Curve],
    scales: Scales,
    levels: Sequence[Level] = (),
    note: str = "",
    rings: Sequence[tuple[float, float]] = (),
) -> Chart:
    """Draw a chart; points and dashed lines show their values on hover.

    Args:
        title: Heading.
        curves: The lines.
        scales: The axes.
        levels: Horizontal dashed lines.
        note: Text beside the heading.
        rings: Points with a ring around them.
    """
    parts = []
    for tick in scales.ticks:
        y = scales.up(tick)
        parts.append(svg("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(svg("text", scales.text(tick), class_="tick", x=LEFT - 5, y=y + 4))
    for mark in scales.marks:
        parts.append(svg("text", scales.x_text(mark), class_="mark", x=scales.across(mark), y=HEIGHT - 6))
    for level in levels:
        y = scales.up(level.value)
        title_text = svg("title", f"{level.name}: {scales.text(level.value)}")
        parts.append(svg("line", title_text, class_=f"level {level.kind}", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
    for curve in curves:
        parts += _intervals(curve, scales)
    for curve in (curve for curve in curves if curve.line):
        path = "M" + "L".join(f"{scales.across(x):.1f},{scales.up(y):.1f}" for x, y in curve.points)
        parts.append(svg("path", svg("title", curve.name), class_=f"curve {curve.kind}", d=path))
    for x, y in rings:
        parts.append(svg("circle", class_="ring", cx=round(scales.across(x), 1), cy=round(scales.up(y), 1), r=7.5))
    for curve in curves:
        for i, (x, y) in enumerate(curve.points):
            text = svg("title", curve.tips[i] if curve.tips else f"{curve.name} at {scales.x_text(x)}: {scales.text(y)}")
            parts.append(svg("circle", text, class_="hit", cx=round(scales.across(x), 1), cy=round(scales.up(y), 1), r=5))
    drawing = svg("svg", joined(*parts), class_="curves", width=WIDTH, height=HEIGHT, role="img", aria_label=title)
    return Chart(title, note, drawing)


def _intervals(curve: Curve, scales: Scales) -> list[Markup]:
    """Draw the interval and the dot of each point of a curve that has intervals."""
    parts = []
    for (x, y), ends in zip(curve.points, curve.ends, strict=False):
        at = round(scales.across(x), 1)
        if ends is not None:
            parts.append(
                svg("line", class_="ends", x1=at, x2=at, y1=round(scales.up(ends[0]), 1), y2=round(scales.up(ends[1]), 1))
            )
        parts.append(svg("circle", class_="dot", cx=at, cy=round(scales.up(y), 1), r=3.5))
    return parts


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
    title: str,
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    tints: Tints,
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
