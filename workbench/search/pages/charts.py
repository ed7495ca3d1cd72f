"""Charts of a search: scores by candidate number and by single dimensions, importances, and what two objectives trade off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.ground.numbers import listed
from workbench.report.chart import AXIS, Chart, Ends, Frame, Scale, cut, fluid_plot, joined, marked, room, spread, stretched, svg
from workbench.report.numbers import PERCENT, raw
from workbench.report.scatter import Point, ScatterAxis, drawing, front
from workbench.search.pages.view import DimensionView, ObjectiveView, SearchView, number, written
from workbench.search.pages.wording import tip
from workbench.search.result import TrialRow

TALL, SMALL, ROW, BAR = 250, 170, 30, 26
"""Heights in pixels: of a history, of a dimension's chart, of the row of a choice, and of an importance."""
GROUND = 20
"""Height of the row of failed candidates below a history."""
NARROWEST, FEW = 520, 330
"""Smallest widths of a history with many and with few candidates."""
LABEL, LONGEST, CHOICE = 16, 22, 20
"""Height of a control's label; most letters of its name, and of a choice."""
SPREAD, GOLDEN = 0.6, 0.618034
"""Share of a row over which the points of one choice are spread, and the step that keeps neighbors apart."""


@dataclass(frozen=True)
class Bars:
    """Importance of the dimensions under one objective: names, shares as text, and the bars."""

    objective: str
    rows: tuple[tuple[str, str], ...]
    drawing: Markup


def scores_scale(view: SearchView, objective: ObjectiveView, more: Sequence[float] = ()) -> Scale:
    """Return a scale over the scores of all candidates, including estimates, and over the values in `more`."""
    return Scale.over([*more, *(c.scores[objective.index] for c in view.found.trials if c.scores)])


def has(candidate: TrialRow, dimension: DimensionView) -> bool:
    """Return True if a candidate has a value of a dimension."""
    value = candidate.values.get(dimension.name)
    if dimension.numeric:
        return number(value) is not None
    return value is not None and written(value) in dimension.choices


def _candidate(candidate: TrialRow, frame: Frame, x: float, y: float, view: SearchView) -> Markup:
    """Draw a candidate: hollow if it was stopped early, a diamond if it was drawn at random, larger if it was chosen."""
    shape = ("diamond" if candidate.random else "round") + ("" if candidate.complete else "-hollow")
    kind = "candidate" + (" chosen" if candidate.name in view.chosen else "") + (" random" if candidate.random else "")
    use = svg("use", href=f"#c-{shape}", x=frame.across(x), y=frame.up(y))
    return marked(tip(candidate, view), kind, frame.dot("hit", x, y, 8), use)


def _in_order(view: SearchView) -> list[tuple[TrialRow, list[float]]]:
    """Return the scored candidates with their scores in drawing order: those stopped early first, the chosen ones last."""
    scored = [(c, c.scores) for c in view.found.trials if c.scores]
    return sorted(scored, key=lambda pair: (pair[0].name in view.chosen, pair[0].complete))


def _scale_at_left(frame: Frame, unit: float) -> tuple[list[Markup], list[Markup], int]:
    """Return the labels of the scale at the left of a plot, the plot's grid lines, and the width of the labels."""
    places = frame.y.ticks(unit)
    texts = frame.y.texts(places, unit)
    width = room(texts)
    labels = [svg("text", t, class_="tick y", x=width - 8, y=frame.up(v) + 4) for v, t in zip(places, texts, strict=True)]
    return labels, frame.rows(places), width


def _scale_below(frame: Frame, unit: float = 1.0, ground: float = 0.0) -> list[Markup]:
    places = frame.x.ticks(unit)
    return frame.columns(places, frame.x.texts(places, unit), below=17 + ground)


def history(view: SearchView) -> list[Chart]:
    """Return one chart per objective: candidates by number, the best so far, the controls."""
    return [_history(view, objective) for objective in view.objectives] if view.found.trials else []


def best_so_far(candidates: Sequence[TrialRow], objective: ObjectiveView) -> list[tuple[int, float]]:
    """Return (number, score) of each candidate that is better than all before it, without candidates that were stopped early."""
    improvements: list[tuple[int, float]] = []
    for c in sorted(candidates, key=lambda c: c.number):
        if c.complete and c.scores and (not improvements or objective.better(c.scores[objective.index], improvements[-1][1])):
            improvements.append((c.number, c.scores[objective.index]))
    return improvements


def _history(view: SearchView, objective: ObjectiveView) -> Chart:
    """Return the chart of one objective."""
    index, last = objective.index, max(c.number for c in view.found.trials)
    controls = [(c.name, c.scores[index]) for c in view.found.controls]
    ground = GROUND if any(c.failed for c in view.found.trials) else 0
    x = Scale(-0.5 - 0.02 * last, last + 0.5 + 0.02 * last)
    y = scores_scale(view, objective, [score for _, score in controls])
    frame = Frame.flowing(x, y, max(TALL, LABEL * len(controls)))
    labels, grid, width = _scale_at_left(frame, objective.unit.scale)
    names, lines = _controls(view, objective, frame, controls)
    arms = ((view.drawn, "best random"), (view.searched, "best"))
    steps = [frame.stairs(best_so_far(arm, objective), kind, last=last) for arm, kind in arms]
    drawn = [*grid, *_numbers(frame, last, ground), *lines, stretched(*steps, height=frame.bottom), *_failed(view, frame, ground)]
    drawn += [_candidate(c, frame, c.number, scores[index], view) for c, scores in _in_order(view)]
    label, below = f"Scores of {objective.name} by candidate number", ground + AXIS
    if names:
        texts = room(f"{cut(name, LONGEST)} {objective.unit.score(score)}" for name, score in controls)
        right = svg("svg", joined(*names), class_="gutter labels", width=texts + 14, height=frame.bottom + below)
    plot = fluid_plot(label, frame, drawn, labels, width, below=below, right=right if names else "")
    note = f"{objective.measure} by candidate number; {objective.direction}."
    return Chart(objective.name, note, plot, min(NARROWEST, FEW + 8 * last))


def _numbers(frame: Frame, last: int, ground: float = 0.0) -> list[Markup]:
    """Return the axis of candidate numbers, with ticks at whole numbers only."""
    places = [v for v in Scale(0, max(last, 1)).ticks() if v == round(v) and v <= last]
    return frame.columns(places, frame.x.texts(places), below=17 + ground)


def _controls(
    view: SearchView, objective: ObjectiveView, frame: Frame, controls: Sequence[tuple[str, float]]
) -> tuple[list[Markup], list[Markup]]:
    """Return the controls' labels at the right, without overlaps, and a line for each control across the plot."""
    labels, lines = [], []
    places = spread([frame.up(score) for _, score in controls], LABEL, frame.top, frame.bottom)
    for (name, score), at in zip(controls, places, strict=True):
        kind, shown = "control-line best" if name == view.found.best_control else "control-line", objective.unit.score(score)
        lines.append(frame.level(score, kind))
        labels.append(svg("line", class_=kind, x1=0, x2=14, y1=frame.up(score), y2=at))
        text = svg("text", f"{cut(name, LONGEST)} {shown}", x=18, y=at + 4)
        labels.append(marked(f"{name}\n{objective.measure}: {shown}", kind, text))
    return labels, lines


def _failed(view: SearchView, frame: Frame, ground: float) -> list[Markup]:
    """Return the marks of failed candidates below the plot."""
    parts, floor = [], frame.bottom + ground
    for c in (c for c in view.found.trials if c.failed):
        at = frame.across(c.number)
        hit = svg("circle", class_="hit", cx=at, cy=floor - 5, r=8)
        parts.append(marked(tip(c, view), "", hit, svg("line", class_="failed", x1=at, x2=at, y1=floor - 9, y2=floor)))
    return parts


def importances(view: SearchView) -> list[Bars]:
    """Return one set of bars per objective; the longest bar fills the width."""
    charts = []
    for name, shares in view.importances.items():
        scale = Scale(0.0, max((share for _, share in shares), default=0.0) or 1.0)
        frame = Frame.flowing(scale, scale, BAR * len(shares), top=0)
        bars = [
            svg("rect", class_="bar", x=0, y=BAR * i + 6, width=frame.across(share), height=BAR - 12, rx=2)
            for i, (_, share) in enumerate(shares)
        ]
        label = f"Importances of dimensions for {name}"
        drawn = svg("svg", joined(*bars), class_="plot", width="100%", height=frame.bottom, role="img", aria_label=label)
        charts.append(Bars(name, tuple((dimension, PERCENT.worded(share).lstrip("+")) for dimension, share in shares), drawn))
    return charts


def curves(view: SearchView) -> list[tuple[ObjectiveView, list[Chart]]]:
    """Return by objective one panel per dimension that a scored candidate has."""
    charts = []
    for objective in view.objectives:
        panels = [_dimension(view, objective, d) for d in view.dimensions]
        if shown := [p for p in panels if p is not None]:
            charts.append((objective, shown))
    return charts


def _dimension(view: SearchView, objective: ObjectiveView, d: DimensionView) -> Chart | None:
    """Return the scores by the values of a dimension: upwards by a number, or from left to right with one row per choice."""
    index = objective.index
    candidates = [(c, scores[index], c.interval(index)) for c, scores in _in_order(view) if has(c, d)]
    if not candidates:
        return None
    best = next((c.scores[index] for c in view.found.controls if c.name == view.found.best_control), None)
    more = [*([] if best is None else [best]), *(end for _, _, ends in candidates for end in ends or ())]
    levels = scores_scale(view, objective, more)
    plot = (_by_number if d.numeric else _by_choice)(view, objective, d, candidates, levels, best)
    scored = sum(c.scores is not None for c in view.found.trials)
    note = f"{len(candidates)} of {scored} candidates" if len(candidates) < scored else f"{scored} candidates"
    return Chart(d.name, note + (" · logarithmic" if d.log else ""), plot)


Scored = tuple[TrialRow, float, Ends]
"""A candidate with its score and interval under one objective."""


def _by_number(
    view: SearchView, objective: ObjectiveView, d: DimensionView, found: Sequence[Scored], levels: Scale, best: float | None
) -> Markup:
    """Draw the score by a number, with the best control's score as a line."""
    values = [number(c.values[d.name]) or 0.0 for c, _, _ in found]
    frame = Frame.flowing(Scale.over([d.low, d.high, *values], log=d.log, room=0.04), levels, SMALL)
    labels, grid, width = _scale_at_left(frame, objective.unit.scale)
    drawn = [*grid, *_scale_below(frame)]
    drawn += [] if best is None else [frame.level(best, "control-line best")]
    for value, (_, score, ends) in zip(values, found, strict=True):
        drawn += frame.bars(value, score, None, ends, "whisker")
    drawn += [_candidate(c, frame, v, score, view) for v, (c, score, _) in zip(values, found, strict=True)]
    return fluid_plot(f"{objective.name} against {d.name}", frame, drawn, labels, width)


def _by_choice(
    view: SearchView, objective: ObjectiveView, d: DimensionView, found: Sequence[Scored], levels: Scale, best: float | None
) -> Markup:
    """Draw the score from left to right; equal scores of one choice are spread by the candidates' numbers, so that they do not overlap."""
    rows = Scale(0, len(d.choices))
    frame = Frame.flowing(levels, rows, ROW * len(d.choices))
    middles = [rows.high - i - 0.5 for i in range(len(d.choices))]
    texts = [cut(choice, CHOICE) for choice in d.choices]
    width = room(texts)
    labels = [
        marked(choice, "", svg("text", text, class_="tick y", x=width - 8, y=frame.up(y) + 4))
        for choice, text, y in zip(d.choices, texts, middles, strict=True)
    ]
    drawn = [*_scale_below(frame, objective.unit.scale), *frame.rows(middles)]
    if best is not None:
        at = frame.across(best)
        drawn.append(svg("line", class_="control-line best", x1=at, x2=at, y1=frame.top, y2=frame.bottom))
    places = {
        c.name: middles[d.choices.index(written(c.values[d.name]))] - SPREAD * ((c.number * GOLDEN) % 1 - 0.5)
        for c, _, _ in found
    }
    for c, score, ends in found:
        drawn += frame.bars(score, places[c.name], ends, None, "whisker")
    drawn += [_candidate(c, frame, score, places[c.name], view) for c, score, _ in found]
    return fluid_plot(f"{objective.name} by choice of {d.name}", frame, drawn, labels, width)


def on_front(view: SearchView) -> tuple[str, ...]:
    """Return the names of the candidates that no other candidate beats on both objectives; none if there are not two objectives."""
    if len(view.objectives) != 2:
        return ()
    complete = [(c.name, c.scores) for c in view.searched if c.complete and c.scores]
    up = [tuple(-v if o.lower else v for v, o in zip(scores, view.objectives, strict=True)) for _, scores in complete]
    return tuple(name for (name, _), on in zip(complete, front([(a, b) for a, b in up]), strict=True) if on)


def pareto(view: SearchView) -> Chart | None:
    """Return the plot of complete candidates and controls, or None if there are not two objectives or nothing to draw."""
    if len(view.objectives) != 2:
        return None
    x, y = view.objectives
    names = on_front(view)
    points = [
        Point(
            c.name,
            False,
            c.scores[0],
            c.scores[1],
            tip(c, view),
            None,
            None,
            c.name in names,
            c.name in (*(view.found.front or ()), *names),
        )
        for c in view.searched
        if c.complete and c.scores
    ]
    for control in view.found.controls:
        a, b = control.scores
        text = f"{control.name}\n{x.measure}: {x.unit.score(a)}\n{y.measure}: {y.unit.score(b)}"
        points.append(Point(control.name, True, a, b, text, None, None))
    if not names or len(points) < 2:
        return None
    note = (
        "Scores on search items of the controls and of the candidates that were scored on all of them. The front joins the candidates that "
        f"no other candidate beats on both objectives: {listed(names)}."
    )
    across, up = (ScatterAxis(o.measure, o.unit.scale, o.lower) for o in (x, y))
    return Chart("Pareto front", note, drawing(points, across, up, "Pareto front"), front=names)


def hypervolume(view: SearchView) -> Chart | None:
    """Return the chart of the area that the Pareto front covers after each candidate, for two objectives."""
    areas = view.found.hypervolume or []
    if len(view.objectives) != 2 or len(areas) < 2:
        return None
    unit, last = raw(max(abs(v) for v in areas)), len(areas) - 1
    frame = Frame.flowing(Scale(-0.02 * last, 1.02 * last), Scale.over([0.0, *areas], room=0.04), TALL)
    labels, grid, width = _scale_at_left(frame, 1.0)
    points = [(i, v) for i, v in enumerate(areas) if i == 0 or v != areas[i - 1]]
    marks = []
    for i, value in points:
        circles = (frame.dot("hit", i, value, 8), frame.dot("knot", i, value, 2.5))
        marks.append(marked(f"After {i + 1} candidates\nArea {unit.score(value)}", "", *circles))
    line = stretched(frame.stairs(points, "best", last=last), height=frame.bottom)
    note = (
        "Area between the Pareto front of controls and candidates and the worst score of each objective, after each candidate that was "
        "scored on all items."
    )
    plot = fluid_plot("Hypervolume by candidate number", frame, [*grid, *_numbers(frame, last), line, *marks], labels, width)
    return Chart("Hypervolume", note, plot, 300)
