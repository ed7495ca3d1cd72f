"""Forest plots: one panel of differences against the baseline per task, as inline SVG that keeps its text size.

X positions are percentages of the plot's width and y positions are pixels, so that the plot follows the width
of the page without scaling letters and marks. Labels are beside the plot, in rows of the same height.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.compare.differences import Difference
from workbench.report.marks import tip, verdict_class
from workbench.report.numbers import POINTS, Unit, signed, unit_of
from workbench.report.svg import joined, svg

ROW = 26  # pixels; the style sheet's line height of labels
GAP = 12
AXIS = 26
SIDE = 14
INSET = 3.0  # percent of the width left free at both ends, for marks at the ends


@dataclass(frozen=True)
class ForestLine:
    """A row of a panel: the difference, its vertical center in pixels, and its row in the page's grid."""

    difference: Difference
    y: int
    grid_row: int


@dataclass(frozen=True)
class Panel:
    """One task: rows of labels and values, and the plot between them."""

    task: ComparedTask
    lines: tuple[ForestLine, ...]
    grid_rows: str
    plot: Markup


@dataclass(frozen=True)
class ForestAxis:
    """A linear scale in stored units."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return the position of a value in percent of the width; values outside the scale are clipped."""
        inner = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return INSET + inner * (100 - 2 * INSET)

    def at(self, value: float) -> str:
        """Return the x position of a value as an SVG length."""
        return f"{self.share(value):.3f}%"

    def width(self, low: float, high: float) -> str:
        """Return the width of an interval as an SVG length."""
        return f"{self.share(high) - self.share(low):.3f}%"


def panels(view: Comparison, names: Container[str] | None = None) -> list[Panel]:
    """Return the panels in task order. Shares have one axis per role, and each metric in its own unit has its own axis.

    Args:
        view: The comparison.
        names: Named configurations that get a row; default: all. Controls always get one.
    """
    by_task = {t.name: [d for d in _differences_on(view, t, names) if d.diff is not None] for t in view.tasks}
    shared: dict[str, list[Difference]] = {}
    units = {t.name: unit_of(view, t.name) for t in view.tasks}
    # Shares share the axis of their role; a contrast and a metric in its own unit have their own.
    keys = {t.name: t.role if units[t.name] == POINTS and t.contrast is None else t.name for t in view.tasks}
    reach: dict[str, float] = {}
    for task in view.tasks:
        key = keys[task.name]
        shared.setdefault(key, []).extend(by_task[task.name])
        reach[key] = max(reach.get(key, 0.0), _reach(task))
    axes = {keys[t]: axis(shared[keys[t]], unit, reach[keys[t]] or None) for t, unit in units.items()}
    return [_panel(view, t, by_task[t.name], axes[keys[t.name]]) for t in view.tasks if by_task[t.name]]


def axis(differences: Iterable[Difference], unit: Unit, margin: float | None = None) -> ForestAxis:
    """Return a scale over all intervals and zero, with ticks at round numbers; percentage points are clipped at ±100."""
    ends = [v for d in differences for v in (d.diff, d.low, d.high, d.low_adj, d.high_adj) if v is not None]
    if unit == POINTS:
        ends = [min(max(v, -1.0), 1.0) for v in ends]
    if margin is not None:
        ends += [-margin, margin]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    if low == high:
        low, high = -1 / unit.scale, 1 / unit.scale
    return ForestAxis(low, high, ticks(low, high, unit.scale))


def ticks(low: float, high: float, scale: float = 1.0) -> tuple[float, ...]:
    """Return about five values between `low` and `high` that are round numbers after multiplication by `scale`."""
    step = _step((high - low) * scale / 5) / scale
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * i for i in range(first, last + 1))


def decimals(numbers: Iterable[float]) -> int:
    """Return the smallest number of decimals that shows the numbers exactly, 6 at most."""
    values = list(numbers)
    return next((d for d in range(6) if all(abs(t - round(t, d)) < 1e-7 for t in values)), 6)


def _differences_on(view: Comparison, task: ComparedTask, names: Container[str] | None) -> list[Difference]:
    shown = [c for c in view.by_role if c.is_control or names is None or c.name in names]
    return [d for c in shown for d in view.compared(c.name, [task])]


def _reach(task: ComparedTask) -> float:
    """Return the minimum reach of the axis from zero: the tolerance or the smallest effect of interest must be visible."""
    return (task.min_effect if task.tolerance is None else task.tolerance) or 0.0


def _step(rough: float) -> float:
    """Return the smallest round number that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough - 1e-12)


def _panel(view: Comparison, task: ComparedTask, differences: Sequence[Difference], scale: ForestAxis) -> Panel:
    """Return one task's panel, with a gap between named configurations and controls."""
    controls = {c.name for c in view.controls}
    lines: list[ForestLine] = []
    rows: list[int] = []
    for d in differences:
        if lines and (d.configuration in controls) != (lines[-1].difference.configuration in controls):
            rows.append(GAP)
        rows.append(ROW)
        lines.append(ForestLine(d, sum(rows) - ROW // 2, len(rows)))
    unit = unit_of(view, task.name)
    height, below = sum(rows), AXIS + (SIDE if task.lower else 0)
    plot = svg(
        "svg",
        joined(
            _frame(scale, task, unit, height),
            *(_mark(line, scale, unit, view.baseline) for line in lines),
        ),
        class_="plot",
        width="100%",
        height=height + below,
        role="img",
        aria_label=f"Differences against {view.baseline} on {task.name}{', lower is better' if task.lower else ''}",
    )
    return Panel(task, tuple(lines), " ".join(f"{r}px" for r in [*rows, below]), plot)


def _frame(scale: ForestAxis, task: ComparedTask, unit: Unit, height: int) -> Markup:
    """Draw the grid, the zero line, the tick labels, the better side if it is the left one, and the margin of the verdicts.

    The margin is the smallest effect of interest, as a pale column; on guarded tasks the tolerance, as a dashed line on the side of losses.
    """
    parts = []
    if task.tolerance is None and (margin := task.min_effect):
        span = {"x": scale.at(-margin), "width": scale.width(-margin, margin)}
        parts.append(svg("rect", class_="margin", y=0, height=height, **span))
    shown = [t * unit.scale for t in scale.ticks]
    places = decimals(shown)
    for tick, number in zip(scale.ticks, shown, strict=True):
        x = scale.at(tick)
        kind = "zero" if abs(number) < 1e-9 else "grid"
        parts.append(svg("line", class_=kind, x1=x, x2=x, y1=0, y2=height))
        parts.append(svg("text", signed(number, places), class_="tick", x=x, y=height + 17))
    if task.tolerance is not None:
        x = scale.at(task.tolerance if task.lower else -task.tolerance)
        parts.append(svg("line", class_="tolerance", x1=x, x2=x, y1=0, y2=height))
    if task.lower:
        parts.append(svg("text", "\N{LEFTWARDS ARROW} better", class_="side", x=0, y=height + 32))
    return joined(*parts)


def _mark(line: ForestLine, scale: ForestAxis, unit: Unit, baseline: str) -> Markup:
    """Draw one difference: hover text, adjusted interval (band), 95 % interval (line), the verdict's mark."""
    d, y, name = line.difference, line.y, verdict_class(line.difference.verdict)
    parts = [
        svg("title", tip(d, unit, baseline)),
        svg("rect", class_="hit", x=0, y=y - ROW // 2, width="100%", height=ROW),
    ]
    if d.low_adj is not None and d.high_adj is not None:
        span = {"x": scale.at(d.low_adj), "width": scale.width(d.low_adj, d.high_adj)}
        parts.append(svg("rect", class_="band", y=y - 5, height=10, rx=2, **span))
    if d.low is not None and d.high is not None:
        parts.append(svg("line", class_="ci", x1=scale.at(d.low), x2=scale.at(d.high), y1=y, y2=y))
    parts.append(svg("use", href=f"#m-{name}", x=scale.at(d.diff or 0.0), y=y))
    return svg("g", joined(*parts), class_=f"mark v-{name}")
