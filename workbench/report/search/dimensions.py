"""Charts of single dimensions: their importance, and the score by the dimension's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.report.numbers import PERCENT
from workbench.report.search.chart import (
    AXIS,
    TOP,
    Figure,
    Scale,
    bottom_scale,
    cut,
    in_order,
    left_scale,
    mark,
    plot,
    room,
    scores_scale,
)
from workbench.report.search.view import Candidate, DimensionView, ObjectiveView, SearchView, number, written
from workbench.report.svg import joined, svg

HEIGHT, ROW, BAR = 170, 30, 26
LONGEST = 20
SPREAD = 0.6  # share of a row's height over which the points of one choice are spread
GOLDEN = 0.618034


@dataclass(frozen=True)
class Bars:
    """Importance of the dimensions under one objective: names, shares as text, and the bars."""

    objective: str
    rows: tuple[tuple[str, str], ...]
    drawing: Markup


def importances(view: SearchView) -> list[Bars]:
    """Return one set of bars per objective; the longest bar fills the width."""
    charts = []
    for name, shares in view.importances.items():
        longest = max((share for _, share in shares), default=0.0) or 1.0
        bars = [
            svg("rect", class_="bar", x=0, y=BAR * i + 6, width=f"{100 * max(share, 0.0) / longest:.2f}%", height=BAR - 12, rx=2)
            for i, (_, share) in enumerate(shares)
        ]
        drawing = svg(
            "svg",
            joined(*bars),
            class_="plot",
            width="100%",
            height=BAR * len(shares),
            role="img",
            aria_label=f"Importances of dimensions for {name}",
        )
        charts.append(Bars(name, tuple((dimension, PERCENT.worded(share).lstrip("+")) for dimension, share in shares), drawing))
    return charts


def curves(view: SearchView) -> list[tuple[ObjectiveView, list[Figure]]]:
    """Return by objective one panel per dimension that a scored candidate has."""
    charts = []
    for objective in view.objectives:
        panels = [(_numeric if d.numeric else _strips)(view, objective, d) for d in view.dimensions]
        if shown := [p for p in panels if p is not None]:
            charts.append((objective, shown))
    return charts


def has(candidate: Candidate, dimension: DimensionView) -> bool:
    """Return True if a candidate has a value of a dimension."""
    value = candidate.values.get(dimension.name)
    if dimension.numeric:
        return number(value) is not None
    return value is not None and written(value) in dimension.choices


def _best(view: SearchView, objective: ObjectiveView) -> float | None:
    """Return the best control's score under an objective, or None."""
    scores = next((c.scores for c in view.controls if c.name == view.best_control), ())
    return scores[objective.index] if objective.index < len(scores) else None


def _drawn(candidates: Sequence[Candidate], objective: ObjectiveView, best: float | None) -> list[float]:
    """Return the values that a panel shows besides scores: the best control's score and the ends of intervals."""
    return [*([] if best is None else [best]), *(end for c in candidates for end in c.interval(objective) or ())]


def _numeric(view: SearchView, objective: ObjectiveView, d: DimensionView) -> Figure | None:
    """Return a chart of the score by a number, with the best control's score as a line."""
    candidates = [c for c in in_order(view) if has(c, d)]
    if not candidates:
        return None
    best = _best(view, objective)
    y = scores_scale(view, objective, _drawn(candidates, objective, best))
    x = Scale.over([d.low, d.high, *(float(c.values[d.name]) for c in candidates)], log=d.log, room=0.04)
    gutter, grid = left_scale(y, HEIGHT, objective.unit.scale)
    drawn = [*grid, *bottom_scale(x, HEIGHT)]
    if best is not None:
        at = y.up(best, HEIGHT)
        drawn.append(svg("line", class_="control-line best", x1=0, x2="100%", y1=at, y2=at))
    places = [(c, x.across(float(c.values[d.name]))) for c in candidates if c.scores]
    drawn += [_whisker(at, at, *(y.up(end, HEIGHT) for end in ends)) for c, at in places if (ends := c.interval(objective))]
    drawn += [mark(c, at, y.up(c.scores[objective.index], HEIGHT), view) for c, at in places if c.scores]
    drawing = plot(f"{objective.name} against {d.name}", HEIGHT, AXIS, drawn, gutter)
    return Figure(d.name, _count(view, len(candidates)) + (" · logarithmic" if d.log else ""), drawing)


def _strips(view: SearchView, objective: ObjectiveView, d: DimensionView) -> Figure | None:
    """Return a chart with one row per choice and the score from left to right."""
    candidates = [c for c in in_order(view) if has(c, d)]
    if not candidates:
        return None
    best = _best(view, objective)
    x = scores_scale(view, objective, _drawn(candidates, objective, best))
    height = ROW * len(d.choices)
    texts = [cut(choice, LONGEST) for choice in d.choices]
    width = room(texts)
    names, rows = [], []
    for i, (choice, text) in enumerate(zip(d.choices, texts, strict=True)):
        middle = TOP + ROW * i + ROW / 2
        label = svg("text", text, class_="tick y", x=width - 8, y=middle + 4)
        names.append(svg("g", joined(svg("title", choice), label), class_="mark"))
        rows.append(svg("line", class_="grid", x1=0, x2="100%", y1=middle, y2=middle))
    if best is not None:
        at = x.across(best)
        rows.append(svg("line", class_="control-line best", x1=at, x2=at, y1=TOP, y2=TOP + height))
    intervals = [(_row(c, d), ends) for c in candidates if (ends := c.interval(objective))]
    marks = [_whisker(x.across(low), x.across(high), at, at) for at, (low, high) in intervals]
    marks += [mark(c, x.across(c.scores[objective.index]), _row(c, d), view) for c in candidates if c.scores]
    gutter = svg("svg", joined(*names), class_="gutter", width=width, height=TOP + height + AXIS)
    drawn = [*bottom_scale(x, height, objective.unit.scale), *rows, *marks]
    drawing = plot(f"{objective.name} by choice of {d.name}", height, AXIS, drawn, gutter)
    return Figure(d.name, _count(view, len(candidates)), drawing)


def _whisker(left: str, right: str, upper: float, lower: float) -> Markup:
    """Draw a candidate's interval."""
    return svg("line", class_="whisker", x1=left, x2=right, y1=upper, y2=lower)


def _row(candidate: Candidate, d: DimensionView) -> float:
    """Return a candidate's y position in the row of its choice, spread by its number so that equal scores do not overlap."""
    middle = TOP + ROW * (d.choices.index(written(candidate.values[d.name])) + 0.5)
    return round(middle + ROW * SPREAD * ((candidate.number * GOLDEN) % 1 - 0.5), 1)


def _count(view: SearchView, shown: int) -> str:
    scored = sum(c.scores is not None for c in view.candidates)
    return f"{shown} of {scored} candidates" if shown < scored else f"{scored} candidates"
