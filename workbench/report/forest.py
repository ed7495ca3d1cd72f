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
from workbench.ground.numbers import signed
from workbench.report.chart import AXIS, Frame, Scale, decimals, joined, marked, svg
from workbench.report.marks import tip, verdict_class
from workbench.report.numbers import POINTS, Unit, unit_of

ROW = 26  # pixels; the style sheet's line height of labels
GAP = 12
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
        reach[key] = max(reach.get(key, 0.0), (task.min_effect if task.tolerance is None else task.tolerance) or 0.0)  # visible
    axes = {keys[t]: axis(shared[keys[t]], unit, reach[keys[t]] or None) for t, unit in units.items()}
    return [_panel(view, t, by_task[t.name], axes[keys[t.name]]) for t in view.tasks if by_task[t.name]]


def axis(differences: Iterable[Difference], unit: Unit, margin: float | None = None) -> Scale:
    """Return a scale over all intervals and zero; percentage points are clipped at ±100."""
    ends = [v for d in differences for v in (d.diff, d.low, d.high, d.low_adj, d.high_adj) if v is not None]
    if unit == POINTS:
        ends = [min(max(v, -1.0), 1.0) for v in ends]
    if margin is not None:
        ends += [-margin, margin]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    if low == high:
        low, high = -1 / unit.scale, 1 / unit.scale
    return Scale(low, high)


def _differences_on(view: Comparison, task: ComparedTask, names: Container[str] | None) -> list[Difference]:
    """Return a task's differences, named configurations first, each group with the best score first."""
    shown = [c for c in view.by_role if c.is_control or names is None or c.name in names]
    differences = [d for c in shown for d in view.compared(c.name, [task])]
    controls = {c.name for c in view.controls}
    worst = -math.inf if not task.lower else math.inf
    return sorted(
        differences,
        key=lambda d: (d.configuration in controls, (1 if task.lower else -1) * (worst if d.value is None else d.value)),
    )


def _panel(view: Comparison, task: ComparedTask, differences: Sequence[Difference], scale: Scale) -> Panel:
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
    frame = Frame(scale, Scale(0, 1), INSET, 100 - INSET, 0, height, fluid=True)
    marks = [*_grid(frame, task, unit), *(_mark(line, frame, unit, view.baseline) for line in lines)]
    label = f"Differences against {view.baseline} on {task.name}{', lower is better' if task.lower else ''}"
    plot = svg("svg", joined(*marks), class_="plot", width="100%", height=height + below, role="img", aria_label=label)
    return Panel(task, tuple(lines), " ".join(f"{r}px" for r in [*rows, below]), plot)


def _grid(frame: Frame, task: ComparedTask, unit: Unit) -> list[Markup]:
    """Draw the grid, the zero line, the tick labels, the better side if it is the left one, and the margin of the verdicts.

    The margin is the smallest effect of interest, as a pale column; on guarded tasks the tolerance, as a dashed line on the side of losses.
    """
    height, scale, parts = frame.bottom, unit.scale, []
    if task.tolerance is None and (margin := task.min_effect):
        span = {"x": frame.across(-margin), "width": frame.width(-margin, margin)}
        parts.append(svg("rect", class_="margin", y=0, height=height, **span))
    places = frame.x.ticks(scale)
    digits = decimals(v * scale for v in places)
    parts += frame.columns(places, [signed(v * scale, digits) for v in places])
    lines = [("zero", 0.0)]
    if task.tolerance is not None:
        lines.append(("tolerance", task.tolerance if task.lower else -task.tolerance))
    parts += [svg("line", class_=kind, x1=frame.across(v), x2=frame.across(v), y1=0, y2=height) for kind, v in lines]
    if task.lower:
        parts.append(svg("text", "\N{LEFTWARDS ARROW} better", class_="side", x=0, y=height + 32))
    return parts


def _mark(line: ForestLine, frame: Frame, unit: Unit, baseline: str) -> Markup:
    """Draw one difference: hover text, adjusted interval (band), 95 % interval (line), the verdict's mark."""
    d, y, name = line.difference, line.y, verdict_class(line.difference.verdict)
    parts = [svg("rect", class_="hit", x=0, y=y - ROW // 2, width="100%", height=ROW)]
    if d.low_adj is not None and d.high_adj is not None:
        span = {"x": frame.across(d.low_adj), "width": frame.width(d.low_adj, d.high_adj)}
        parts.append(svg("rect", class_="band", y=y - 5, height=10, rx=2, **span))
    if d.low is not None and d.high is not None:
        parts.append(svg("line", class_="ci", x1=frame.across(d.low), x2=frame.across(d.high), y1=y, y2=y))
    parts.append(svg("use", href=f"#m-{name}", x=frame.across(d.diff or 0.0), y=y))
    return marked(tip(d, unit, baseline), f"v-{name}", *parts)
