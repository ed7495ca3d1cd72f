"""Sweeps of a comparison: a grid of levels for tables, and curves with intervals against a swept number, one small chart for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.compare.comparison import Comparison
from workbench.compare.sweeps import ComparedSweep, Plain, SweepLevel, SweepMeasure, SweptField, SweptPoint
from workbench.compare.swept import place_of
from workbench.ground.numbers import MISSING, fixed, listed, plural
from workbench.ground.tables import Table
from workbench.ground.tables import as_markdown as escape
from workbench.report.chart import Chart, Curve, Ends, Level, Scale, Scales, chart, decimals
from workbench.report.numbers import POINTS, Unit, raw

SPREAD = 20
"""Ratio of the largest to the smallest number from which on an axis is logarithmic."""
OPEN = 12
"""Charts of a measure that are shown; with more, all are folded."""
NEAR = 26  # pixels between the marks of an x axis


@dataclass(frozen=True)
class Grid:
    """The points of a sweep by the value on the x axis and by the values of all other fields; seeds are averaged.

    Attributes:
        name: Name of the recipe.
        across: The dimension on the x axis: the first one of numbers, else the first one; None if only a seed varies.
        rows: Texts of its values.
        places: Their places on the axis.
        columns: Texts of the combinations of the other fields.
        points: Points by row and column. A point whose method lacks the field on the axis has row None.
        measures: What is drawn.
        seeds: Number of seeds that a point is the mean of; 1 without a seed among the dimensions.
    """

    name: str
    across: SweptField | None
    rows: tuple[str, ...]
    places: tuple[float, ...]
    columns: tuple[str, ...]
    points: Mapping[tuple[int | None, int], SweptPoint]
    measures: tuple[SweepMeasure, ...]
    seeds: int

    @property
    def count(self) -> int:
        """Number of configurations, each seed counted."""
        return sum(len(point.configurations) for point in self.points.values())

    def unit(self, measure: SweepMeasure) -> Unit:
        """Return the unit of a measure's levels."""
        levels = [point.levels.get(measure.key) for point in self.points.values()]
        return POINTS if measure.share else raw(max((abs(v.value) for v in levels if v), default=0.0))

    def level(self, row: int | None, column: int, measure: SweepMeasure) -> SweepLevel | None:
        """Return value and interval of a point under a measure; None if there is no such point or it was not scored."""
        point = self.points.get((row, column))
        return point.levels.get(measure.key) if point else None

    def table(self, measure: SweepMeasure) -> tuple[list[str], list[list[str]]]:
        """Return head and rows of a table of a measure: the value with its interval, by row and column."""
        unit = self.unit(measure)
        head = [self.across.name if self.across else "", *self.columns]
        lines: list[tuple[str, int | None]] = [(text, i) for i, text in enumerate(self.rows)]
        if any(row is None for row, _ in self.points):
            lines.append(("without it" if self.across else plural(self.seeds, "seed"), None))
        rows = [[text, *(_cell(self.level(i, c, measure), unit) for c in range(len(self.columns)))] for text, i in lines]
        return head, rows


@dataclass(frozen=True)
class SweepFigure:
    """A sweep as the page draws it.

    Attributes:
        title: Heading.
        caption: Sentences below the charts.
        groups: Heading of a measure, and its charts.
        folded: The charts are too many to stay open.
        ringed: A ring marks the recommended configuration, or the one that misses least.
        baseline: Name of the baseline, whose level is a dashed line.
    """

    title: str
    caption: str
    groups: tuple[tuple[str, tuple[Chart, ...]], ...]
    folded: bool
    ringed: str | None
    baseline: str


def grids(view: Comparison) -> list[Grid]:
    """Return the grids of a comparison's sweeps."""
    return [_grid(sweep) for sweep in view.sweeps or ()]


def figures(view: Comparison) -> list[SweepFigure]:
    """Return the figures of a comparison's sweeps. A sweep of seeds alone has none, because it has no axis."""
    ringed = view.recommendation.about if view.recommendation else None
    return [_figure(grid, view.baseline, ringed) for grid in grids(view) if grid.across]


def sentence(grid: Grid) -> str:
    """Return what a sweep of seeds alone shows: each measure with its interval and the spread between seeds."""
    parts = []
    for measure in grid.measures:
        level, unit = grid.level(None, 0, measure), grid.unit(measure)
        if level:
            between = "" if level.between is None else f", standard deviation between seeds {unit.score(level.between)}"
            parts.append(f"{measure.text} {_cell(level, unit)}{between}")
    return f"{grid.name}, mean over {plural(grid.seeds, 'seed')}: {'; '.join(parts)}." if parts else ""


def tables(view: Comparison) -> list[str | Table]:
    """Return the parts of the Markdown report: one table for each measure of each sweep."""
    parts: list[str | Table] = []
    for grid in grids(view):
        if not grid.across:
            parts.append(escape(sentence(grid)))
            continue
        for measure in grid.measures:
            head, rows = grid.table(measure)
            over = f", mean over {grid.seeds} seeds" if grid.seeds > 1 else ""
            parts += [
                f"## Sweep of {escape(grid.name)}: {escape(measure.text)}{over}",
                Table(f"sweep-of-{grid.name}-{measure.text}", head, rows),
            ]
            if measure.baseline is not None:
                parts.append(
                    f"{escape(view.baseline)}: {grid.unit(measure).score(measure.baseline)}. Brackets are 95 % intervals."
                )
    return parts


def text_of(value: Plain) -> str:
    """Return a swept value as text; a list of bricks is joined."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " + ".join(value) if isinstance(value, list) else str(value)


def _cell(level: SweepLevel | None, unit: Unit) -> str:
    if not level:
        return MISSING
    return unit.cell(
        f"{unit.score(level.value)} {unit.levels(level.low, level.high)}".rstrip(), level.value, level.low, level.high
    )


def _grid(sweep: ComparedSweep) -> Grid:
    varied = [d for d in sweep.dimensions if not d.seed]
    across = next((d for d in varied if d.number), varied[0] if varied else None)
    others = [d for d in varied if d is not across]
    columns: dict[str, int] = {}
    points = {}
    for point in sweep.points:
        values = point.values
        column = columns.setdefault(_combination(others, values), len(columns))
        row = across.values.index(values[across.name]) if across and across.name in values else None
        points[row, column] = point
    rows, places = _axis(across) if across else ((), ())
    seeds = max((len(p.configurations) for p in sweep.points), default=1)
    scored = tuple(m for m in sweep.measures if any(p.levels.get(m.key) for p in sweep.points))
    return Grid(sweep.name, across, rows, places, tuple(columns), points, scored, seeds)


def _combination(others: Sequence[SweptField], values: Mapping[str, Plain]) -> str:
    """Return the values of the fields that are not on the axis; a single field is known by its value alone."""
    named = [(d.label, text_of(values[d.name])) for d in others if d.name in values]
    words = [value if not _numeric(value) else f"{label} {value}" for label, value in named]
    return ", ".join(words) or ("" if others else "all")


def _numeric(text: str) -> bool:
    return text.replace(".", "", 1).lstrip("-").isdecimal() or text in ("true", "false")


def _axis(across: SweptField) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return texts and places of the values on the x axis."""
    values = across.values
    if not across.number:
        return tuple(map(text_of, values)), tuple(map(float, range(len(values))))
    places = tuple(place_of(v) or 0.0 for v in values)
    if isinstance(values[0], list):
        return tuple(plural(int(place), "brick") for place in places), places
    if min(places) > 0 and max(places) >= SPREAD * min(places):
        places = tuple(map(math.log10, places))
    return tuple(map(text_of, values)), places


def _figure(grid: Grid, baseline: str, ringed: str | None) -> SweepFigure:
    names = {name for point in grid.points.values() for name in point.configurations}
    shown = ringed if ringed in names else None
    groups = tuple((_heading(m), tuple(_charts(grid, m, baseline, shown))) for m in grid.measures)
    return SweepFigure(
        title=f"Sweep of {grid.name}",
        caption=_caption(grid, baseline, shown),
        groups=groups,
        folded=len(grid.columns) > OPEN,
        ringed=shown,
        baseline=baseline,
    )


def _heading(measure: SweepMeasure) -> str:
    text = measure.text
    unit = ", %" if measure.share else ""
    return f"{text[0].upper()}{text[1:]}{unit}{' (lower is better)' if measure.lower else ''}"


def _caption(grid: Grid, baseline: str, ringed: str | None) -> str:
    assert grid.across is not None
    of = listed(m.text.partition(":")[0] for m in grid.measures)
    parts = [f"{of[0].upper()}{of[1:]} of {plural(grid.count, 'configuration')} against {grid.across.name}."]
    if grid.seeds > 1:
        parts.append(
            f"Each point is the mean over {plural(grid.seeds, 'seed')}; its 95 % interval covers the spread between seeds and that of items."
        )
    else:
        parts.append(
            "Bars are 95 % intervals of single scores; whether two points differ is said by the verdicts, which are paired."
        )
    parts.append(f"The dashed line is {baseline}.")
    if ringed:
        parts.append(f"The ring marks {ringed}.")
    return " ".join(parts)


def _charts(grid: Grid, measure: SweepMeasure, baseline: str, ringed: str | None) -> list[Chart]:
    """Return one chart for each column, with shared scales."""
    unit = grid.unit(measure)
    scale, words = _scales(grid, measure, unit)
    charts = []
    for column, name in enumerate(grid.columns):
        levels = [Level(baseline, measure.baseline * unit.scale, "item")] if measure.baseline is not None else []
        if (fixed_level := grid.level(None, column, measure)) and grid.across:
            levels.append(Level(f"{name}, without {grid.across.label}", fixed_level.value * unit.scale, "own"))
        drawn: list[tuple[tuple[float, float], Ends, str]] = []
        rings: list[tuple[float, float]] = []
        for row, place in sorted(enumerate(grid.places), key=lambda pair: pair[1]):
            level = grid.level(row, column, measure)
            if not level:
                continue
            where = (place, level.value * unit.scale)
            beside = f", {name}" if name != "all" else ""
            drawn.append((where, _ends(level, unit), f"{words[row]}{beside}\n{_cell(level, unit)}"))
            if ringed in grid.points[row, column].configurations:
                rings.append(where)
        line = bool(grid.across and grid.across.number)
        points = [where for where, _, _ in drawn]
        curve = Curve(name, points, "main", [ends for _, ends, _ in drawn], [tip for _, _, tip in drawn], line)
        title = name if name != "all" else grid.name
        charts.append(chart(title, [curve] if drawn else [], scale, levels, rings=rings))
    return charts


def _scales(grid: Grid, measure: SweepMeasure, unit: Unit) -> tuple[Scales, list[str]]:
    """Return the scales that the charts of a measure share, and the texts of the x values in hover texts."""
    assert grid.across is not None
    values = [] if measure.baseline is None else [measure.baseline * unit.scale]
    for row, column in grid.points:
        if level := grid.level(row, column, measure):
            values += [level.value * unit.scale, *(_ends(level, unit) or ())]
    up = Scale.over(values, room=0.04)
    marks = up.ticks()
    digits = decimals(marks)
    label = grid.across.label or grid.across.name
    words = [text if isinstance(grid.across.values[0], list) else f"{label} {text}" for text in grid.rows]
    first, last = (min(grid.places), max(grid.places)) if grid.places else (0.0, 1.0)
    margin = 0.06 * (last - first) or 0.5
    by_place = dict(zip(grid.places, (text.partition(" brick")[0] for text in grid.rows), strict=True))  # "3 bricks" is 3
    scales = Scales(
        (first - margin, last + margin),
        (up.low, up.high),
        marks,
        _apart(grid, first - margin, last + margin),
        lambda v: fixed(v, digits),
        lambda v: by_place.get(v, f"{v:g}"),
        lambda v: unit.score(v / unit.scale),
    )
    return scales, words


def _apart(grid: Grid, low: float, high: float) -> list[float]:
    """Return the x values that have room for a mark below the axis, the first and the last among them."""
    width = 226.0 / (high - low)
    shown: list[float] = []
    places = sorted(grid.places)
    longest = max(map(len, grid.rows), default=1)
    near = max(NEAR, 6.5 * longest + 6) / width
    for place in places:
        if not shown or place - shown[-1] >= near:
            shown.append(place)
    if places and shown[-1] != places[-1]:
        shown = [*(p for p in shown if places[-1] - p >= near), places[-1]]
    return shown


def _ends(level: SweepLevel, unit: Unit) -> Ends:
    low, high = level.low, level.high
    return None if low is None or high is None else (low * unit.scale, high * unit.scale)
