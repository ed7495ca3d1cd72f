"""What charts and tables share: verdict classes, hover texts, tinted cells, interval strips."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from workbench.report.numbers import MISSING, Unit, about, p_value, plural
from workbench.report.svg import joined, svg
from workbench.report.view import Configuration, Difference, Effect, Estimate, Task, View, verdict_word

CLASSES = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent",
    "cannot tell": "unclear",
    "no item changed": "same",
}
DECIDED = ("better", "worse")
DARKEST = 0.55
PALEST = 0.10


@dataclass(frozen=True)
class Cell:
    """A cell of a matrix: number, interval, verdict class, strength of the tint, hover text, own task."""

    text: str
    interval: str
    kind: str
    tint: float
    tip: str
    own: bool = False


UNSCORED = Cell(MISSING, "", "none", 0.0, "not scored")


@dataclass(frozen=True)
class Matrix:
    """Rows of cells with a label each; controls are set apart by a gap before the row `gap_before`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    gap_before: str | None = None


def verdict_class(verdict: str | None) -> str:
    """Name of a verdict in style sheets and of its mark; anything unknown looks like "cannot tell"."""
    return CLASSES.get(verdict_word(verdict) or "", "unclear")


def tip(d: Difference, unit: Unit, baseline: str) -> str:
    """Hover text of a difference, one fact a line."""
    lines = [f"{d.configuration} on {d.task}: {verdict_text(d)}"]
    lines.append(f"Score {unit.score(d.value)}, {baseline} {unit.score(d.baseline_value)}")
    lines.append(f"Difference {unit.worded(d.diff)}")
    if d.low is not None:
        lines.append(f"95 % interval {unit.around(d.low, d.high)}")
    if d.low_adj is not None:
        lines.append(f"Adjusted {unit.around(d.low_adj, d.high_adj)}")
    if d.p_adj is not None:
        lines.append(f"p {p_value(d.p)}, adjusted {p_value(d.p_adj)}")
    if d.reason:
        lines.append(d.reason)
    if d.n is not None:
        clusters = f" in {plural(d.clusters, 'cluster')}" if d.clusters else ""
        lines.append(f"{plural(d.n, 'item')}{clusters}")
    if d.wins is not None and d.losses is not None:
        lines.append(f"{d.wins} gained, {d.losses} lost")
    return "\n".join(lines)


def verdict_text(d: Difference) -> str:
    """The verdict word, with the number of items it needs where it cannot tell."""
    if d.word == "cannot tell" and d.needs:
        return f"{d.verdict} (needs about {about(d.needs)} items)"
    return d.verdict or MISSING


def differences(view: View) -> Matrix:
    """Task by configuration matrix: differences against the baseline, tinted where better or worse."""
    largest = _largest(view, view.differences.values())
    rows = []
    for c in view.configurations:
        found = {d.task: d for d in view.compared(c.name, view.tasks)}
        if found:
            cells = [_difference_cell(view, t, found.get(t.name), c, largest) for t in view.tasks]
            rows.append((c.name, tuple(cells)))
    first = view.named[0].name if view.named and view.controls else None
    return Matrix(tuple(t.name for t in view.tasks), tuple(rows), first)


def interference(view: View) -> Matrix:
    """Brick by task matrix, the brick's own task outlined."""
    owners = {t.name: t.owner for t in view.tasks}
    largest = _largest(view, view.effects.values())
    rows = []
    for brick in view.bricks:
        effects = [view.effects.get((brick, task)) for task in view.effect_tasks]
        cells = [_effect_cell(view, e, owners.get(e.task) == brick, largest) if e else UNSCORED for e in effects]
        rows.append((brick, tuple(cells)))
    return Matrix(view.effect_tasks, tuple(rows))


def bracket(low: str, high: str, width: str) -> Markup:
    """An interval; `width` is a style class that reserves room, so that ends stand below each other."""
    if MISSING in (low, high):
        return Markup("")
    return Markup('<span class="ci-text">[<span class="{w}">{low}</span>, <span class="{w}">{high}</span>]</span>').format(
        w=width, low=low, high=high
    )


def recipe_markup(text: str) -> Markup:
    """Recipe text, escaped, with comments and keys marked for the style sheet."""
    lines = []
    for line in text.splitlines():
        hash_sign = re.search(r"(?:^|(?<=\s))#", line)
        end = hash_sign.start() if hash_sign else len(line)
        key = re.match(r"(\s*(?:- )?)([\w.-]+)(:(?:\s|$).*)", line[:end])
        code = Markup("{}<b>{}</b>{}").format(*key.groups()) if key else escape(line[:end])
        lines.append(code + Markup("<i>{}</i>").format(line[end:]))
    return Markup("\n").join(lines)


def strip(estimate: Estimate, top: float) -> Markup:
    """An interval on a rail from 0 to `top` with a reference line at 1; x positions are percentages."""

    def at(value: float | None) -> str:
        return f"{100 * min(max((value or 0.0) / top, 0.0), 1.0):.2f}%"

    parts = [
        svg("line", class_="rail", x1=0, x2="100%", y1=8, y2=8),
        svg("line", class_="zero", x1=at(1.0), x2=at(1.0), y1=1, y2=15),
    ]
    if estimate.low is not None and estimate.high is not None:
        parts.append(svg("line", class_="ci", x1=at(estimate.low), x2=at(estimate.high), y1=8, y2=8))
    parts.append(svg("circle", class_="dot", cx=at(estimate.value), cy=8, r=3.5))
    return svg("svg", joined(*parts), class_="strip", width="100%", height=16, aria_hidden="true")


def strip_top(view: View) -> float:
    """Common end of the kept strips: 120 %, or the largest interval where one reaches further."""
    ends = [e.high or e.value or 0.0 for e in (c.kept_mean for c in view.configurations) if e]
    return max([1.2, *ends])


def _difference_cell(view: View, task: Task, d: Difference | None, c: Configuration, largest: dict[Unit, float]) -> Cell:
    if d is None:
        return UNSCORED
    return Cell(
        task.unit.diff(d.diff),
        task.unit.diffs(d.low_adj, d.high_adj),
        verdict_class(d.verdict),
        _tint(d.diff, d.word, largest[task.unit]),
        tip(d, task.unit, view.baseline),
        task.owner is not None and (task.owner in c.parents or task.owner == c.name),
    )


def _effect_cell(view: View, e: Effect, own: bool, largest: dict[Unit, float]) -> Cell:
    unit = view.unit(e.task)
    tip = [f"{e.brick} alone on {e.task}: {e.verdict or MISSING}", f"Difference {unit.worded(e.diff)}"]
    if e.low is not None:
        tip.append(f"Adjusted {unit.around(e.low, e.high)}")
    tint = _tint(e.diff, verdict_word(e.verdict), largest[unit])
    return Cell(unit.diff(e.diff), unit.diffs(e.low, e.high), verdict_class(e.verdict), tint, "\n".join(tip), own)


def _tint(value: float | None, word: str | None, largest: float) -> float:
    if value is None or word not in DECIDED:
        return 0.0
    return round(PALEST + (DARKEST - PALEST) * min(abs(value) / largest, 1.0), 3)


def _largest(view: View, found: Iterable[Difference | Effect]) -> dict[Unit, float]:
    """Largest decided difference of each unit: what the darkest tint stands for."""
    largest = {t.unit: 0.0 for t in view.tasks}
    for d in found:
        unit = view.unit(d.task)
        if verdict_word(d.verdict) in DECIDED and d.diff is not None:
            largest[unit] = max(largest.get(unit, 0.0), abs(d.diff))
    return {view.unit(d): 1.0 for d in view.effect_tasks} | {unit: value or 1.0 for unit, value in largest.items()}
