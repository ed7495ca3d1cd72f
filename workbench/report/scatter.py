"""Scatter plots with the Pareto front: mean over skills against retention, and against parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from workbench.compare.comparison import Comparison
from workbench.compare.configurations import ComparedConfiguration, Level
from workbench.compare.sweeps import ComparedSweep
from workbench.ground.numbers import MISSING, amount, fixed, listed
from workbench.report.chart import Chart, Ends, Frame, Scale, cut, joined, marked, svg
from workbench.report.numbers import POINTS, unit_of

WIDTH, HEIGHT = 380, 300  # near its size on a phone, where letters are then as large as elsewhere
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 46
LETTER, LINE = 7.2, 15  # approximate width and height of a label's letters in pixels, to keep labels from overlapping
LONGEST, ROOM = 28, 0.07
ANCHORS = {"start": 0.0, "middle": 0.5, "end": 1.0}
# Positions of a name relative to its point, in pixels, the preferred ones first.
OFFSETS = (
    (10, 4, "start"),
    (-10, 4, "end"),
    (0, -10, "middle"),
    (0, 20, "middle"),
    (8, -8, "start"),
    (8, 17, "start"),
    (-8, -8, "end"),
    (-8, 17, "end"),
)


@dataclass(frozen=True)
class Point:
    """A configuration at its two values, with the intervals that it has."""

    name: str
    control: bool
    x: float
    y: float
    tip: str
    y_ends: Ends
    x_ends: Ends
    front: bool = False
    named: bool = True
    """True if its name is shown beside it, when there is room."""
    chosen: bool = False
    """True if the recommendation names it."""
    label: str = ""
    """Text beside it, if that is not the name."""


@dataclass(frozen=True)
class ScatterAxis:
    """An axis: its label, the factor from stored to shown values, and whether lower is better."""

    label: str
    scale: float = 1.0
    lower: bool = False
    text: Callable[[float], str] | None = None

    @property
    def title(self) -> str:
        """The label with the better direction."""
        return f"{self.label} ({'lower' if self.lower else 'higher'} is better)"


MEAN = ScatterAxis("mean over skills", POINTS.scale)


def scatters(view: Comparison) -> list[Chart]:
    """Return plots of skills against retention, if there is a retention task, and against parameters, if these differ."""
    return [s for s in (retention_plot(view), size_plot(view)) if s is not None]


def retention_plot(view: Comparison) -> Chart | None:
    """Return the plot of skills against retention, if there is a retention task."""
    if not view.retention:
        return None
    axis, level = _retention(view)
    return _scatter(view, "Skills and retention", axis, MEAN, level)


def size_plot(view: Comparison) -> Chart | None:
    """Return the plot of skills against parameters, if these differ."""
    if len({c.parameters for c in view.by_role if c.parameters is not None}) < 2:
        return None
    return _scatter(
        view, "Skills and size", ScatterAxis("parameters", lower=True, text=amount), MEAN, lambda c: _exact(c.parameters)
    )


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether it is on the Pareto front, with higher as better on both axes; equal points are on it together."""
    return [not any(o[0] >= p[0] and o[1] >= p[1] and o != p for o in points) for p in points]


def _retention(view: Comparison) -> tuple[ScatterAxis, Callable[[ComparedConfiguration], Level | None]]:
    """Return the retention axis: the score of the only share, the mean corrected score of several, or the first task's own metric."""
    tasks = view.retention
    shares = [t for t in tasks if unit_of(view, t.name) == POINTS]
    if len(shares) > 1:
        axis = ScatterAxis("mean over " + listed(t.name for t in shares), POINTS.scale)

        def mean(c: ComparedConfiguration) -> Level | None:
            levels = [c.scores[t.name].corrected for t in shares if t.name in c.scores]
            corrected = [v for v in levels if v is not None]
            return Level(value=sum(corrected) / len(corrected), low=None, high=None) if len(corrected) == len(shares) else None

        return axis, mean
    task = shares[0] if shares else tasks[0]
    unit = unit_of(view, task.name)
    word = f", {unit.word}" if unit != POINTS and unit.word else ""
    return ScatterAxis(task.name + word, unit.scale, task.lower), lambda c: c.scores.get(task.name)


def _points_of(sweep: ComparedSweep) -> Iterator[tuple[str, str]]:
    """Yield name and label of each configuration of a sweep; the label is the name without that of the recipe."""
    for point in sweep.points:
        for name in point.configurations:
            yield name, name[len(sweep.name) :].strip("[]")


def _exact(value: int | None) -> Level | None:
    return None if value is None else Level(value=float(value), low=None, high=None)


def _scatter(
    view: Comparison, title: str, x: ScatterAxis, y: ScatterAxis, level: Callable[[ComparedConfiguration], Level | None]
) -> Chart | None:
    """Return the plot of mean skill against another value, or None for fewer than two points."""
    points = [p for c in view.by_role if (p := _point(c, level(c), x, y))]
    if len(points) < 2:
        return None
    best = front([(-p.x if x.lower else p.x, p.y) for p in points])
    chosen = view.recommendation.about if view.recommendation else None
    swept = {name: label for sweep in view.sweeps or () for name, label in _points_of(sweep)}
    points = [
        replace(p, front=on, chosen=p.name == chosen, label=swept.get(p.name, "")) for p, on in zip(points, best, strict=True)
    ]
    names = tuple(p.name for p in points if p.front)
    caption = (
        f"The Pareto front joins the configurations that no other configuration beats on both axes: {listed(names)}. "
        "Bars are 95 % intervals; configurations with overlapping bars may be ordered differently on other items."
    )
    return Chart(title, caption, drawing(points, x, y, title), front=names)


def _point(c: ComparedConfiguration, x: Level | None, x_axis: ScatterAxis, y_axis: ScatterAxis) -> Point | None:
    if x is None or x.value is None or c.mean is None or c.mean.value is None:
        return None
    tip = f"{c.name}\n{_axis_text(x_axis, x)}\n{_axis_text(y_axis, c.mean)}"
    return Point(c.name, c.is_control, x.value, c.mean.value, tip, _ends(c.mean), _ends(x))


def _axis_text(axis: ScatterAxis, e: Level) -> str:
    ends = f" [{_formatted(axis, e.low)}, {_formatted(axis, e.high)}]" if e.low is not None and e.high is not None else ""
    return f"{axis.label.capitalize()} {_formatted(axis, e.value)}{ends}"


def _formatted(axis: ScatterAxis, value: float | None) -> str:
    if value is None:
        return MISSING
    if axis.text is not None:
        return axis.text(value)
    return fixed(value * axis.scale, 1 if axis.scale == POINTS.scale else 3)


def _ends(e: Level) -> Ends:
    return None if e.low is None or e.high is None else (e.low, e.high)


def drawing(points: Sequence[Point], x: ScatterAxis, y: ScatterAxis, title: str) -> Markup:
    """Draw the points, their names, and the border of the area that the front dominates."""

    def values(of: Callable[[Point], float], ends: Callable[[Point], Ends]) -> list[float]:
        return [of(p) for p in points] + [v for p in points if not p.control for v in ends(p) or ()]

    xs = values(lambda p: p.x, lambda p: p.x_ends)
    wide = x.text is not None and min(xs) > 0 and max(xs) > 10 * min(xs)
    across, up = Scale.over(xs, log=wide, room=ROOM), Scale.over(values(lambda p: p.y, lambda p: p.y_ends), room=ROOM)
    frame = Frame(across, up, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM)
    steps = sorted({(p.x, p.y) for p in points if p.front}, reverse=x.lower)
    # Later points cover earlier ones: points without a name, then controls, then the named configurations.
    order = sorted(points, key=lambda p: (p.named, not p.control, p.front))
    parts = [
        *frame.columns(*_ticks(across, x)),
        *frame.rows(*_ticks(up, y), LEFT - 7),
        svg("text", x.title, class_="label", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8),
        svg("text", y.title, class_="label left", x=2, y=13),
        frame.stairs(steps, "front", rise_first=True),
        *(_mark(p, frame) for p in order),
        *_labels([(p, float(frame.across(p.x)), frame.up(p.y)) for p in points]),
    ]
    label = f"{title}: {y.label} against {x.label}"
    return svg("svg", joined(*parts), class_="scatter", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _ticks(scale: Scale, axis: ScatterAxis) -> tuple[Sequence[float], list[str]]:
    """Return the values that an axis names, and their texts."""
    places = scale.ticks(axis.scale)
    return places, [axis.text(v) for v in places] if axis.text else scale.texts(places, axis.scale)


def _mark(p: Point, frame: Frame) -> Markup:
    """Draw a point with its intervals and hover text."""
    ring = [frame.dot("ring", p.x, p.y, 9)] if p.chosen else []
    point = frame.dot("point", p.x, p.y, 4.5 if p.control else 5.5)
    kind = ("control" if p.control else "named") + (" on-front" if p.front else "")
    bars = frame.bars(p.x, p.y, p.x_ends, p.y_ends, "reach")
    return marked(p.tip, kind, frame.dot("hit", p.x, p.y, 13), *bars, *ring, point)


def _labels(points: Sequence[tuple[Point, float, float]]) -> list[Markup]:
    """Place names beside their points, those on the front first; a name without room appears only in the hover text."""
    occupied = [(x - 6, y - 6, x + 6, y + 6) for p, x, y in points if p.named]
    labels = []
    for p, x, y in sorted((q for q in points if q[0].named), key=lambda q: (not q[0].chosen, not q[0].front, q[0].control)):
        text = p.label or p.name
        text = cut(text, LONGEST)
        width = LETTER * len(text)
        for dx, dy, anchor in OFFSETS:
            at, base = x + dx, y + dy
            left = at - width * ANCHORS[anchor]
            box = (left, base - LINE + 4, left + width, base + 3)
            inside = left >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in occupied):
                occupied.append(box)
                kind = ("name" if not p.control else "name control") + (" on-front" if p.front else "")
                labels.append(svg("text", text, class_=kind, x=round(at, 1), y=round(base, 1), text_anchor=anchor))
                break
    return labels
