"""Charts over the candidate number: scores, and the area that the Pareto front covers."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from workbench.report.numbers import raw
from workbench.report.search.chart import (
    AXIS,
    TOP,
    WIDE,
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
    spread,
    stretched,
)
from workbench.report.search.view import Candidate, ObjectiveView, SearchView
from workbench.report.search.wording import tip
from workbench.report.svg import joined, svg

HEIGHT, GROUND = 250, 20  # heights in pixels of the plot and of the row of failed candidates below it
LABEL, LONGEST = 16, 22  # height of a control's label in pixels, maximum letters of its name
NARROWEST, FEW = 520, 330  # minimum widths in pixels with many and with few candidates


def history(view: SearchView) -> list[Figure]:
    """Return one chart per objective: candidates by number, the best so far, the controls."""
    if not view.candidates:
        return []
    return [_history(view, objective) for objective in view.objectives]


def best_so_far(candidates: Sequence[Candidate], objective: ObjectiveView) -> list[tuple[int, float]]:
    """Return (number, score) of each candidate that is better than all before it, without candidates that were stopped early."""
    improvements: list[tuple[int, float]] = []
    for c in sorted(candidates, key=lambda c: c.number):
        if c.complete and c.scores and (not improvements or objective.better(c.scores[objective.index], improvements[-1][1])):
            improvements.append((c.number, c.scores[objective.index]))
    return improvements


def _history(view: SearchView, objective: ObjectiveView) -> Figure:
    """Return the chart of one objective."""
    controls = [c for c in view.controls if objective.index < len(c.scores)]
    height = max(HEIGHT, LABEL * len(controls))
    ground = GROUND if any(c.failed for c in view.candidates) else 0
    y = scores_scale(view, objective, (c.scores[objective.index] for c in controls))
    last = max(c.number for c in view.candidates)
    x = Scale(-0.5 - 0.02 * last, last + 0.5 + 0.02 * last)
    gutter, grid = left_scale(y, height, objective.unit.scale, ground + AXIS)
    labels, lines = _controls(view, objective, y, height, ground)
    steps = [
        _steps(best_so_far(arm, objective), x, y, height, last, kind)
        for arm, kind in ((view.drawn, "best random"), (view.searched, "best"))
    ]
    marks = [mark(c, x.across(c.number), y.up(c.scores[objective.index], height), view) for c in in_order(view) if c.scores]
    below = [*grid, *_numbers(x, last, height + ground), *lines, stretched(*steps, height=TOP + height)]
    drawn = [*below, *_failed(view, x, height + ground), *marks]
    drawing = plot(f"Scores of {objective.name} by candidate number", height, ground + AXIS, drawn, gutter, labels)
    caption = f"{objective.measure} by candidate number; {objective.direction}."
    return Figure(objective.name, caption, drawing, min(NARROWEST, FEW + 8 * last))


def _numbers(x: Scale, last: int, height: int) -> list[Markup]:
    """Return the axis of candidate numbers, with ticks at whole numbers only."""
    places = [v for v in Scale(0, max(last, 1)).ticks() if v == round(v) and v <= last]
    return bottom_scale(x, height, places=places)


def _controls(view: SearchView, objective: ObjectiveView, y: Scale, height: int, ground: int) -> tuple[Markup, list[Markup]]:
    """Return the controls' labels at the right, without overlaps, and a line for each control across the plot."""
    controls = [c for c in view.controls if objective.index < len(c.scores)]
    if not controls:
        return Markup(""), []
    texts = [f"{cut(c.name, LONGEST)} {objective.unit.score(c.scores[objective.index])}" for c in controls]
    places = [y.up(c.scores[objective.index], height) for c in controls]
    labels, lines = [], []
    for control, text, line_y, label_y in zip(controls, texts, places, spread(places, LABEL, TOP, TOP + height), strict=True):
        kind = "control-line best" if control.name == view.best_control else "control-line"
        lines.append(svg("line", class_=kind, x1=0, x2="100%", y1=line_y, y2=line_y))
        labels.append(svg("line", class_=kind, x1=0, x2=14, y1=line_y, y2=label_y))
        title = svg("title", f"{control.name}\n{objective.measure}: {objective.unit.score(control.scores[objective.index])}")
        labels.append(svg("g", joined(title, svg("text", text, x=18, y=label_y + 4)), class_=f"mark {kind}"))
    return svg("svg", joined(*labels), class_="gutter labels", width=room(texts) + 14, height=TOP + height + ground + AXIS), lines


def _steps(best: Sequence[tuple[int, float]], x: Scale, y: Scale, height: int, last: int, kind: str) -> Markup:
    """Return the best so far as a step line up to the last candidate."""
    if not best:
        return Markup("")
    places = [(round(WIDE * x.share(number), 1), y.up(score, height)) for number, score in best]
    path = f"M{places[0][0]:g} {places[0][1]:g}" + "".join(f"H{a:g}V{b:g}" for a, b in places[1:])
    return svg("path", class_=kind, d=f"{path}H{WIDE * x.share(last):.1f}")


def _failed(view: SearchView, x: Scale, floor: int) -> list[Markup]:
    """Return the marks of failed candidates at the bottom of the plot."""
    parts = []
    for c in view.candidates:
        if c.failed:
            at = x.across(c.number)
            line = svg("line", class_="failed", x1=at, x2=at, y1=TOP + floor - 9, y2=TOP + floor)
            hit = svg("circle", class_="hit", cx=at, cy=TOP + floor - 5, r=8)
            parts.append(svg("g", joined(svg("title", tip(c, view)), hit, line), class_="mark"))
    return parts


def hypervolume(view: SearchView) -> Figure | None:
    """Return the chart of the area that the Pareto front covers after each candidate, for two objectives."""
    areas = view.hypervolume
    if len(view.objectives) != 2 or len(areas) < 2:
        return None
    unit = raw(max(abs(v) for v in areas))
    height, last = HEIGHT, len(areas) - 1
    y, x = Scale.over([0.0, *areas], room=0.04), Scale(-0.02 * last, 1.02 * last)
    gutter, grid = left_scale(y, height, 1.0)
    points = [(i, v) for i, v in enumerate(areas) if i == 0 or v != areas[i - 1]]
    marks = []
    for i, value in points:
        title = svg("title", f"After {i + 1} candidates\nArea {unit.score(value)}")
        at, point_y = x.across(i), y.up(value, height)
        circles = (svg("circle", class_="hit", cx=at, cy=point_y, r=8), svg("circle", class_="knot", cx=at, cy=point_y, r=2.5))
        marks.append(svg("g", joined(title, *circles), class_="mark"))
    line = stretched(_steps(points, x, y, height, last, "best"), height=TOP + height)
    drawn = [*grid, *_numbers(x, last, height), line, *marks]
    text = (
        "Area between the Pareto front of controls and candidates and the worst score of each objective, after each candidate that was "
        "scored on all items."
    )
    return Figure("Hypervolume", text, plot("Hypervolume by candidate number", height, AXIS, drawn, gutter), 300)
