"""Parallel coordinates: one axis per dimension and objective, one line per candidate, colored by its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from workbench.ground.numbers import MISSING
from workbench.report.chart import WIDE, Chart, Scale, cut, joined, marked, room, stretched, svg
from workbench.search.pages.charts import has, scores_scale
from workbench.search.pages.view import DimensionView, ObjectiveView, SearchView, number, written
from workbench.search.pages.wording import tip
from workbench.search.result import TrialRow

HEAD, HEIGHT, FOOT = 38, 260, 10
LEAST, HEADING, LONGEST = 96, 24, 16  # minimum pixels between axes; maximum letters of an axis's name and of a choice
SHADES, MANY = 6, 80
BUNDLE = 0.5  # share of the distance between two choices over which the lines of one choice are spread


@dataclass(frozen=True)
class ParallelAxis:
    """A vertical axis: its labels, and the position of each candidate (None if the candidate does not have the dimension)."""

    name: str
    place: Callable[[TrialRow], float | None]
    labels: tuple[tuple[float, str], ...]
    score: bool = False


@dataclass(frozen=True)
class Parallel:
    """The chart, and the worst and best score of its color scale, from candidates that were scored on all items."""

    figure: Chart
    worst: str
    best: str
    objective: ObjectiveView
    clipped: bool
    """True if some scores are worse than the color scale's worst."""


def parallel(view: SearchView) -> Parallel | None:
    """Return the chart, or None if there is no dimension or fewer than two candidates have a score."""
    drawn = [c for c in view.found.trials if c.scores]
    axes = [_dimension(d, view, drawn) for d in view.dimensions if any(has(c, d) for c in drawn)]
    if not axes or not view.objectives or len(drawn) < 2:
        return None
    axes += [_objective(view, o) for o in view.objectives]
    first = view.objectives[0]
    full = [c for c in drawn if c.complete]
    levels = sorted((c.scores[0] for c in (full if len(full) > 1 else drawn) if c.scores), reverse=first.lower)
    worst, best = levels[0], levels[-1]
    # Later lines cover earlier ones: draw better candidates later and the chosen ones last.
    order = sorted((c for c in drawn if c.scores), key=lambda c: (c.name in view.chosen, _goodness(c, first, worst, best)))
    paths = [_path(c, axes, view, shade(_goodness(c, first, worst, best))) for c in order]
    height = HEAD + HEIGHT + FOOT
    content = joined(stretched(*paths, height=height), *(_axis(axis, i, len(axes)) for i, axis in enumerate(axes)))
    drawing = svg(
        "svg",
        content,
        class_="parallel many" if len(drawn) > MANY else "parallel",
        width="100%",
        height=height,
        role="img",
        aria_label=f"Parallel coordinates of {len(drawn)} candidates over {len(axes) - len(view.objectives)} dimensions",
    )
    distance = max([LEAST, *(room([cut(a.name, HEADING)]) + 4 for a in axes)])
    margin = max(0, room(text for _, text in axes[0].labels) - distance // 2)  # the first axis's labels are in the margin
    padded = Markup('<div style="padding-left:{}px">{}</div>').format(margin, drawing)
    figure = Chart("Parallel coordinates", _caption(view, drawn), padded, len(axes) * distance + margin)
    clipped = any(first.better(worst, c.scores[0]) for c in drawn if c.scores)
    return Parallel(figure, first.unit.score(worst), first.unit.score(best), first, clipped)


def shade(goodness: float) -> int:
    """Return the index of one of six colors, from 0 for the worst score to 5 for the best."""
    return min(int(goodness * SHADES), SHADES - 1)


def _goodness(c: TrialRow, objective: ObjectiveView, worst: float, best: float) -> float:
    value = c.scores[objective.index] if c.scores else worst
    return min(max((value - worst) / (best - worst), 0.0), 1.0) if best != worst else 1.0


def _caption(view: SearchView, drawn: Sequence[TrialRow]) -> str:
    text = "Each line is a candidate: its values, then its score."
    if any(not all(has(c, d) for d in view.dimensions) for c in drawn):
        text += " A dashed segment crosses an axis that the candidate does not have, because its method has no such field."
    if any(c.stopped for c in drawn):
        text += " Thin lines are candidates that were stopped early; their scores are estimates."
    failed = sum(c.failed for c in view.found.trials)
    return text + (f" {failed} failed {'candidate is' if failed == 1 else 'candidates are'} left out." if failed else "")


def _y(share: float) -> float:
    return round(HEAD + HEIGHT * (1 - share), 1)


def _dimension(d: DimensionView, view: SearchView, drawn: Sequence[TrialRow]) -> ParallelAxis:
    """Return the axis of a dimension."""
    if not d.numeric:
        return _choices(d, view, drawn)
    scale = Scale.over(
        [d.low, d.high, *(v for c in drawn if (v := number(c.values.get(d.name))) is not None)], log=d.log, room=0.0
    )
    places = scale.ticks()
    labels = tuple((_y(scale.share(v)), text) for v, text in zip(places, scale.texts(places), strict=True))

    def place(c: TrialRow) -> float | None:
        value = number(c.values.get(d.name))
        return None if value is None else _y(scale.share(value))

    return ParallelAxis(d.name, place, labels)


def _choices(d: DimensionView, view: SearchView, drawn: Sequence[TrialRow]) -> ParallelAxis:
    """Return the axis of a dimension with choices; the lines of one choice are spread in the order of their scores."""
    middles = {choice: _y(1 - (i + 0.5) / len(d.choices)) for i, choice in enumerate(d.choices)}
    width = HEIGHT / len(d.choices) * BUNDLE
    places: dict[str, float] = {}
    first = view.objectives[0]
    for choice, middle in middles.items():
        members = [c for c in drawn if has(c, d) and written(c.values[d.name]) == choice and c.scores]
        members.sort(key=lambda c: c.scores[0] if c.scores else 0.0, reverse=not first.lower)
        for i, c in enumerate(members):
            places[c.name] = round(middle + width * ((i + 0.5) / len(members) - 0.5), 1)
    return ParallelAxis(d.name, lambda c: places.get(c.name), tuple((y, cut(choice, LONGEST)) for choice, y in middles.items()))


def _objective(view: SearchView, o: ObjectiveView) -> ParallelAxis:
    """Return the axis of an objective; up is better."""
    scale = scores_scale(view, o)
    places = scale.ticks(o.unit.scale)

    def share(value: float) -> float:
        return 1 - scale.share(value) if o.lower else scale.share(value)

    labels = tuple((_y(share(v)), text) for v, text in zip(places, scale.texts(places, o.unit.scale), strict=True))
    return ParallelAxis(o.measure, lambda c: _y(share(c.scores[o.index])) if c.scores else None, labels, True)


def _path(c: TrialRow, axes: Sequence[ParallelAxis], view: SearchView, color: int) -> Markup:
    """Draw a candidate's line: solid between neighboring axes, dashed across axes that the candidate does not have."""
    points = [(i, y) for i, axis in enumerate(axes) if (y := axis.place(c)) is not None]
    solid = dashed = ""
    for (i, a), (j, b) in pairwise(points):
        part = f"M{_x(i, len(axes)):g} {a:g}L{_x(j, len(axes)):g} {b:g}"
        if j == i + 1:
            solid += part
        else:
            dashed += part
    parts = [svg("path", class_="reach", d=solid + dashed)]
    parts += [svg("path", d=solid)] if solid else []
    parts += [svg("path", class_="jump", d=dashed)] if dashed else []
    kind = "line" + (" chosen" if c.name in view.chosen else "") + (" stopped" if c.stopped else "")
    return marked(tip(c, view), f"{kind} s{color}", *parts)


def _x(index: int, count: int) -> float:
    return round(WIDE * (index + 0.5) / count, 1)


def _axis(axis: ParallelAxis, index: int, count: int) -> Markup:
    x = f"{_x(index, count) / 10:g}%"
    name = marked(axis.name, "", svg("text", cut(axis.name, HEADING), class_="heading", x=x, y=16))
    line = svg("line", class_="axis", x1=x, x2=x, y1=_y(1.0), y2=_y(0.0))
    labels = [svg("text", text or MISSING, class_="tick", x=x, y=y + 4, dx=-6) for y, text in axis.labels]
    return joined(line, name, *labels)
