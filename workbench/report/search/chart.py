"""Shared parts of a search's charts: scales, marks of candidates, a plot with its scale at the left.

X positions are percentages of the plot's width and y positions are pixels, so that a plot follows the width of the page
without scaling letters and marks. Lines are in a separate drawing, 1000 units wide, that is stretched while stroke widths stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.report.forest import decimals, ticks
from workbench.report.numbers import MINUS, fixed
from workbench.report.search.view import Candidate, ObjectiveView, SearchView
from workbench.report.search.wording import tip
from workbench.report.svg import joined, svg

TOP, AXIS = 8, 26
WIDE = 1000.0
LETTER = 6.6  # rough width of a letter in pixels
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and caption; `narrowest` is its minimum width in pixels."""

    title: str
    caption: str
    drawing: Markup
    narrowest: int = 0


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic mapping from values to shares of a length; `low` and `high` are in the values' units."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool = False, room: float = 0.06) -> Scale:
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
        return (inside - self.low) / (self.high - self.low)

    def across(self, value: float) -> str:
        """Return the x position in percent."""
        return f"{100 * self.share(value):.3f}%"

    def up(self, value: float, height: float) -> float:
        """Return the y position in pixels below the top of a plot of this height."""
        return round(TOP + height * (1 - self.share(value)), 1)

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


def scores_scale(view: SearchView, objective: ObjectiveView, more: Iterable[float] = ()) -> Scale:
    """Return a scale over the scores of all candidates, including estimates, and over the values in `more`."""
    return Scale.over([*more, *(c.scores[objective.index] for c in view.candidates if c.scores)])


def cut(text: str, most: int) -> str:
    """Shorten a label to at most so many letters."""
    return text if len(text) <= most else text[: most - 1] + ELLIPSIS


def room(texts: Iterable[str]) -> int:
    """Return the width in pixels that labels need."""
    return math.ceil(LETTER * max((len(t) for t in texts), default=1)) + 12


def plot(label: str, height: int, below: int, marks: Sequence[Markup], gutter: Markup, right: Markup = Markup("")) -> Markup:  # noqa: B008
    """Return a plot with the labels `gutter` at its left and `right` at its right."""
    middle = svg("svg", joined(*marks), class_="plot", width="100%", height=TOP + height + below, role="img", aria_label=label)
    return Markup('<div class="chart">{}{}{}</div>').format(gutter, middle, right)


def left_scale(scale: Scale, height: int, unit: float, below: int = AXIS) -> tuple[Markup, list[Markup]]:
    """Return a vertical scale: its labels, which go beside the plot, and its grid lines, which go into the plot."""
    places = scale.ticks(unit)
    texts = scale.texts(places, unit)
    width = room(texts)
    numbers, lines = [], []
    for value, text in zip(places, texts, strict=True):
        y = scale.up(value, height)
        numbers.append(svg("text", text, class_="tick y", x=width - 8, y=y + 4))
        lines.append(svg("line", class_="grid", x1=0, x2="100%", y1=y, y2=y))
    return svg("svg", joined(*numbers), class_="gutter", width=width, height=TOP + height + below, aria_hidden="true"), lines


def bottom_scale(scale: Scale, height: int, unit: float = 1.0, places: Sequence[float] | None = None) -> list[Markup]:
    """Return a horizontal scale below a plot, with its grid lines."""
    shown = scale.ticks(unit) if places is None else places
    floor = TOP + height
    parts = []
    for value, text in zip(shown, scale.texts(shown, unit), strict=True):
        x = scale.across(value)
        parts.append(svg("line", class_="grid", x1=x, x2=x, y1=TOP, y2=floor))
        parts.append(svg("text", text, class_="tick", x=x, y=floor + 17))
    return parts


def stretched(*paths: Markup, height: float) -> Markup:
    """Return lines whose x from 0 to 1000 spans the whole width; stroke widths stay."""
    box = f"0 0 {WIDE:.0f} {height:g}"
    return svg("svg", joined(*paths), class_="lines", width="100%", height=height, viewBox=box, preserveAspectRatio="none")


def mark(candidate: Candidate, x: str, y: float, view: SearchView) -> Markup:
    """Return a candidate's mark: hollow if it was stopped early, a diamond if it was drawn at random, larger if it was chosen."""
    shape = ("diamond" if candidate.random else "round") + ("" if candidate.complete else "-hollow")
    kind = "mark candidate" + (" chosen" if candidate.name in view.chosen else "") + (" random" if candidate.random else "")
    parts = [
        svg("title", tip(candidate, view)),
        svg("circle", class_="hit", cx=x, cy=y, r=8),
        svg("use", href=f"#c-{shape}", x=x, y=y),
    ]
    return svg("g", joined(*parts), class_=kind)


def in_order(view: SearchView) -> list[Candidate]:
    """Return the scored candidates in drawing order: those stopped early first, the chosen ones last."""
    return sorted((c for c in view.candidates if c.scores), key=lambda c: (c.name in view.chosen, c.complete))


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
