"""Charts of all pages as inline SVG: elements, scales with round ticks, frames, marks with hover texts, labels that keep apart.

Drawn here and not by a plotting library: a page makes no request, and vega or plotly would put 0.8 to 3 MB of script into each. Colors are
classes of the style sheets, so that a chart follows light and dark pages; the page's script writes them into saved files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from markupsafe import Markup

from workbench.ground.numbers import MINUS, fixed

Ends = tuple[float, float] | None
"""Ends of an interval, if there is one."""
LETTER = 6.6
"""Rough width of a letter of a label in pixels."""
AXIS = 26
"""Pixels below a plot for the labels of its axis."""
WIDE = 1000.0
"""Units across a drawing of lines that is stretched to the width of its plot."""


def svg(tag: str, content: str = "", **attributes: object) -> Markup:
    """Return an element; in attribute names a trailing underscore is removed and others become hyphens."""
    names = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    listed = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in names.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, listed, content)


def joined(*parts: Markup) -> Markup:
    """Concatenate elements."""
    return Markup("").join(parts)


def cut(text: str, most: int) -> str:
    """Shorten a label to at most so many letters."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def room(texts: Iterable[str]) -> int:
    """Return the width in pixels that labels need."""
    return math.ceil(LETTER * max((len(t) for t in texts), default=1)) + 12


@dataclass(frozen=True)
class Chart:
    """A chart with its texts.

    Attributes:
        title: Heading.
        note: Text beside or below the heading.
        drawing: The drawing.
        narrowest: Minimum width in pixels; 0 for none.
        front: Names of the points on the Pareto front, if the chart has one.
    """

    title: str
    note: str
    drawing: Markup
    narrowest: int = 0
    front: tuple[str, ...] = ()


def ticks(low: float, high: float, unit: float = 1.0) -> tuple[float, ...]:
    """Return about five values between `low` and `high` that are round numbers after multiplication by `unit`."""
    rough = (high - low) * unit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12) / unit
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * i for i in range(first, last + 1))


def decimals(numbers: Iterable[float]) -> int:
    """Return the smallest number of decimals that shows the numbers exactly, 6 at most."""
    values = list(numbers)
    return next((d for d in range(6) if all(abs(t - round(t, d)) < 1e-7 for t in values)), 6)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic mapping from values to shares of a length; `low` and `high` are in the values' units."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool = False, room: float = 0.06) -> Self:
        """Return a scale over all values, with some room at both ends."""
        numbers = list(values) or [0.0, 1.0]
        low, high = min(numbers), max(numbers)
        if log and low > 0:
            factor = (high / low) ** room if high > low else 2.0
            return cls(low / factor, high * factor, True)
        space = room * (high - low) if high > low else abs(high) * 0.1 or 0.1
        return cls(low - space, high + space)

    def share(self, value: float) -> float:
        """Return the position of a value from 0 (low end) to 1 (high end); values outside are clipped."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            return math.log(inside / self.low) / math.log(self.high / self.low)
        return (inside - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, unit: float = 1.0) -> tuple[float, ...]:
        """Return about five values that are round numbers in the shown unit; on a logarithmic scale 1, 2 and 5 times powers of ten."""
        if not self.log:
            return ticks(self.low, self.high, unit)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = [10.0**k for k in range(first, last + 1)]
        fine = [m * p for p in powers for m in (1, 2, 5)]
        inside = [[v for v in values if self.low <= v <= self.high] for values in (powers, fine)]
        return tuple(inside[0] if len(inside[0]) > 3 else inside[1]) or (self.low, self.high)

    def texts(self, places: Sequence[float], unit: float = 1.0) -> list[str]:
        """Return the tick labels."""
        if self.log:
            return [f"{v:.3g}".replace("e-0", "e-").replace("-", MINUS) for v in places]
        digits = decimals(v * unit for v in places)
        return [fixed(v * unit, digits) for v in places]


@dataclass(frozen=True)
class Frame:
    """The area of a plot, which turns values into positions.

    Attributes:
        x: Scale from left to right.
        y: Scale from bottom to top.
        left: Left edge: in pixels, or in percent of the drawing's width if `fluid`.
        right: Right edge, in the same unit.
        top: Upper edge in pixels.
        bottom: Lower edge in pixels.
        fluid: The plot follows the width of the page without scaling letters and marks: x positions are percentages.
    """

    x: Scale
    y: Scale
    left: float
    right: float
    top: float
    bottom: float
    fluid: bool = False

    @classmethod
    def flowing(cls, x: Scale, y: Scale, height: float, top: float = 8.0) -> Self:
        """Return a fluid frame over the whole width, `height` pixels high."""
        return cls(x, y, 0.0, 100.0, top, top + height, fluid=True)

    def across(self, value: float) -> str:
        """Return the x position of a value as an SVG length."""
        at = self.left + (self.right - self.left) * self.x.share(value)
        return f"{at:.3f}%" if self.fluid else f"{round(at, 1):g}"

    def width(self, low: float, high: float) -> str:
        """Return the width of an interval as an SVG length."""
        wide = (self.right - self.left) * (self.x.share(high) - self.x.share(low))
        return f"{wide:.3f}%" if self.fluid else f"{round(wide, 1):g}"

    def up(self, value: float) -> float:
        """Return the y position of a value in pixels."""
        return round(self.bottom - (self.bottom - self.top) * self.y.share(value), 1)

    def columns(self, places: Sequence[float], texts: Sequence[str], *, lines: bool = True, below: float = 17) -> list[Markup]:
        """Draw grid lines at x values, with their labels `below` pixels below the plot."""
        parts = []
        for value, text in zip(places, texts, strict=True):
            x = self.across(value)
            if lines:
                parts.append(svg("line", class_="grid", x1=x, x2=x, y1=self.top, y2=self.bottom))
            parts.append(svg("text", text, class_="tick", x=x, y=self.bottom + below))
        return parts

    def rows(self, places: Sequence[float], texts: Sequence[str] = (), label: float = 0.0) -> list[Markup]:
        """Draw grid lines at y values, with their labels, if any, ending at the x position `label`."""
        left, right = ("0", "100%") if self.fluid else (self.left, self.right)
        parts = [svg("line", class_="grid", x1=left, x2=right, y1=y, y2=y) for y in map(self.up, places)]
        labels = zip(places, texts, strict=True) if texts else ()
        return [*parts, *(svg("text", t, class_="tick y", x=label, y=self.up(v) + 4) for v, t in labels)]

    def level(self, value: float, kind: str, tip: str = "") -> Markup:
        """Draw a horizontal line at a y value over the whole plot."""
        y, (left, right) = self.up(value), ("0", "100%") if self.fluid else (self.left, self.right)
        return svg("line", svg("title", tip) if tip else "", class_=kind, x1=left, x2=right, y1=y, y2=y)

    def dot(self, kind: str, x: float, y: float, radius: float, tip: str = "") -> Markup:
        """Draw a circle at a point."""
        return svg("circle", svg("title", tip) if tip else "", class_=kind, cx=self.across(x), cy=self.up(y), r=radius)

    def bars(self, x: float, y: float, x_ends: Ends, y_ends: Ends, kind: str) -> list[Markup]:
        """Draw the intervals of a point: across, and up and down."""
        at, up, parts = self.across(x), self.up(y), []
        if x_ends is not None:
            ends = {"x1": self.across(x_ends[0]), "x2": self.across(x_ends[1])}
            parts.append(svg("line", class_=kind, **ends, y1=up, y2=up))
        if y_ends is not None:
            parts.append(svg("line", class_=kind, x1=at, x2=at, y1=self.up(y_ends[0]), y2=self.up(y_ends[1])))
        return parts

    def stairs(
        self, points: Sequence[tuple[float, float]], kind: str, *, rise_first: bool = False, last: float | None = None
    ) -> Markup:
        """Draw a line of steps through points, on to the x value `last`; in a fluid frame it belongs into `stretched`."""
        if not points:
            return Markup("")
        wide = WIDE / 100 if self.fluid else 1.0
        places = [(f"{wide * float(self.across(x).rstrip('%')):.1f}", f"{self.up(y):g}") for x, y in points]
        path = "M" + " ".join(places[0]) + "".join(f"V{y}H{x}" if rise_first else f"H{x}V{y}" for x, y in places[1:])
        end = "" if last is None else f"H{wide * float(self.across(last).rstrip('%')):.1f}"
        return svg("path", class_=kind, d=path + end)


def marked(tip: str, kind: str, *parts: Markup) -> Markup:
    """Return a mark of a drawing with its hover text."""
    return svg("g", joined(svg("title", tip), *parts), class_=f"mark {kind}".rstrip())


def stretched(*paths: Markup, height: float) -> Markup:
    """Return lines whose x from 0 to 1000 spans the whole width; stroke widths stay."""
    box = f"0 0 {WIDE:.0f} {height:g}"
    return svg("svg", joined(*paths), class_="lines", width="100%", height=height, viewBox=box, preserveAspectRatio="none")


def fluid_plot(
    label: str,
    frame: Frame,
    marks: Sequence[Markup],
    gutter: Sequence[Markup],
    width: int,
    *,
    below: float = AXIS,
    right: Markup | str = "",
) -> Markup:
    """Return a fluid plot with the labels `gutter`, `width` pixels wide, at its left and `right` at its right."""
    height = frame.bottom + below
    left = svg("svg", joined(*gutter), class_="gutter", width=width, height=height)
    middle = svg("svg", joined(*marks), class_="plot", width="100%", height=height, role="img", aria_label=label)
    return Markup('<div class="chart">{}{}{}</div>').format(left, middle, right)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart, by at least `gap` if there is room, in their order and close to their places."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    positions = [min(max(places[i], low), high) for i in order]
    for k in range(1, len(positions)):
        positions[k] = max(positions[k], positions[k - 1] + gap)
    if positions:
        positions[-1] = min(positions[-1], high)
    for k in range(len(positions) - 2, -1, -1):
        positions[k] = min(positions[k], positions[k + 1] - gap)
    placed = [0.0] * len(places)
    for i, place in zip(order, positions, strict=True):
        placed[i] = round(place, 1)
    return placed


@dataclass(frozen=True)
class Curve:
    """One line of a small chart.

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
    ends: Sequence[Ends] = ()
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
class Scales:
    """The axes that the small charts of a group share.

    Attributes:
        x: Lowest and highest x.
        y: Lowest and highest y.
        ticks: Values that the y axis names.
        marks: Values that the x axis names.
        text: Format of y values.
        x_text: Format of x values.
        level: Format of the values of dashed lines; default: that of y values, which has the digits of the axis.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    ticks: Sequence[float]
    marks: Sequence[float]
    text: Callable[[float], str] = "{:g}".format
    x_text: Callable[[float], str] = "{:g}".format
    level: Callable[[float], str] | None = None


def chart(
    title: str,
    curves: Sequence[Curve],
    scales: Scales,
    levels: Sequence[Level] = (),
    note: str = "",
    rings: Sequence[tuple[float, float]] = (),
) -> Chart:
    """Draw a small chart; points and dashed lines show their values on hover.

    Args:
        title: Heading.
        curves: The lines.
        scales: The axes.
        levels: Horizontal dashed lines.
        note: Text beside the heading.
        rings: Points with a ring around them.
    """
    width, height = 268, 150
    frame = Frame(Scale(*scales.x), Scale(*scales.y), 34, width - 8, 8, height - 22)
    parts = frame.rows(scales.ticks, list(map(scales.text, scales.ticks)), 29)
    parts += frame.columns(scales.marks, list(map(scales.x_text, scales.marks)), lines=False, below=16)
    parts += [frame.level(v.value, f"level {v.kind}", f"{v.name}: {(scales.level or scales.text)(v.value)}") for v in levels]
    for curve in curves:
        for (x, y), ends in zip(curve.points, curve.ends, strict=False):
            parts += frame.bars(x, y, None, ends, "ends")
            parts.append(frame.dot("dot", x, y, 3.5))
    for curve in (curve for curve in curves if curve.line):
        path = "M" + "L".join(f"{frame.across(x)},{frame.up(y)}" for x, y in curve.points)
        parts.append(svg("path", svg("title", curve.name), class_=f"curve {curve.kind}", d=path))
    parts += [frame.dot("ring", x, y, 7.5) for x, y in rings]
    for curve in curves:
        for i, (x, y) in enumerate(curve.points):
            tip = curve.tips[i] if curve.tips else f"{curve.name} at {scales.x_text(x)}: {scales.text(y)}"
            parts.append(frame.dot("hit", x, y, 5, tip))
    return Chart(
        title, note, svg("svg", joined(*parts), class_="curves", width=width, height=height, role="img", aria_label=title)
    )
