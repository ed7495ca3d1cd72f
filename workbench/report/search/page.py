"""The report of a search as HTML, Markdown and JSON; Markdown has the page's tables and sentences, with tables in place of charts."""

from __future__ import annotations

from pathlib import Path

from workbench.compare.comparison import Comparison
from workbench.errors import shell
from workbench.report import forest, numbers, provenance
from workbench.report.files import with_tables
from workbench.report.markdown import bullets, differences, text_of
from workbench.report.numbers import MISSING, PERCENT, count, listed, plural
from workbench.report.page import filled, write_files
from workbench.report.search import charts, parallel, wording
from workbench.report.search.charts import best_so_far, by_share, pareto
from workbench.report.search.view import ObjectiveView, SearchView, ends_of, search_of, written
from workbench.search.result import Progress, SearchResult, SearchState, TestedRow, TrialRow
from workbench.tables import Cell, Table, fence
from workbench.tables import as_markdown as escape

SCRIPTS = ("report.js", "downloads.js")
STYLES = ("report.css", "search.css")


def render(result: SearchResult, out: Path) -> list[Path]:
    """Write <out>.html, <out>.md and <out>.json and return their paths in that order.

    Each file is replaced as a whole. The HTML page needs no other file and makes no request.

    Args:
        result: The result of the search, which the JSON file holds.
        out: Path of the files; it may end in one of the three suffixes.
    """
    return write_files(out, html(result), markdown(search_of(result)), result)


def html(result: SearchState, watched: int | None = None) -> str:
    """Return the page as text; the template escapes all values of the result.

    Args:
        result: The search, finished or in progress.
        watched: Number of the page if a server shows it (`report.watch`); None for a file.
    """
    view = search_of(result)
    comparison = view.comparison if view.comparison is not None and view.comparison.rows else None
    context = {
        "search": view,
        "title": wording.title(view),
        "watched": watched,
        "headline": _headline(view, view.progress) if view.progress else wording.headline(view),
        "sentences": _sentences(view) if view.progress else wording.sentences(view),
        "suites": view.comparison.provenance.suites if view.comparison else [],
        "created": provenance.created(view.comparison) if view.comparison else "",
        "partial": view.comparison.partial if view.comparison else None,
        "warnings": view.warnings,
        "groups": [group for group in (_tested(view, "found", "random"), _tested(view, "control")) if group],
        "notes": lambda tested: wording.notes(tested, view),
        "difference": lambda tested, objective: wording.difference(tested, view, objective),
        "against": view.against,
        "fate": lambda candidate: wording.fate(candidate, view),
        "score": wording.score,
        "interval": wording.interval,
        "written": written,
        "missing": numbers.MISSING,
        "histories": charts.history(view),
        "bars": charts.importances(view),
        "parallel": parallel.parallel(view),
        "whiskers": any(c.intervals for c in view.result.trials),
        "curves": charts.curves(view),
        "pareto": charts.pareto(view),
        "hypervolume": charts.hypervolume(view),
        "facts": wording.facts(view),
        "stopped": any(c.stopped for c in view.result.trials),
        "failed": any(c.failed for c in view.result.trials),
        "forest": comparison is not None,
        **(_comparison(comparison) if comparison is not None else {}),
    }
    page = filled("search.html.j2", context, SCRIPTS if watched is None else (*SCRIPTS, "watch.js"), STYLES)
    return with_tables(page, tables(view))


def _tested(view: SearchView, *parts: str) -> list[TestedRow]:
    """Return the tested configurations of some parts, the chosen ones or the best control first."""
    tested = [t for t in view.tested if t.part in parts]
    return sorted(tested, key=lambda t: (t.name not in view.chosen, t.name != view.result.best_control))


def _comparison(view: Comparison) -> dict[str, object]:
    """Return the template variables of the panels of differences."""
    return {
        "view": view,
        "unit_of": lambda task: numbers.unit_of(view, task),
        "many": False,
        "panels": forest.panels(view),
        "own_units": any(numbers.unit_of(view, t.name).scale != numbers.POINTS.scale for t in view.tasks),
        "lower": [t.name for t in view.tasks if t.lower],
        "companions": " and ".join(dict.fromkeys(d.companion.metric for d in view.rows if d.companion)).capitalize(),
    }


def _headline(view: SearchView, progress: Progress) -> str:
    """Return the sentences of a search in progress: finished candidates, and the best one so far."""
    if progress.total is None:
        text = f"{plural(progress.done, 'candidate')} {'is' if progress.done == 1 else 'are'} finished."
    else:
        verb = "is" if progress.total == 1 else "are"
        text = f"{count(progress.done)} of {plural(progress.total, 'candidate')} {verb} finished."
    if len(view.objectives) == 1:
        return f"{text} {_best(view, view.objectives[0])}"
    front = charts.on_front(view)
    many = f"{plural(len(front), 'candidate')} {'is' if len(front) == 1 else 'are'} on the Pareto front so far: {listed(front)}."
    return f"{text} {many}" if front else f"{text} {_NONE}"


def _sentences(view: SearchView) -> list[str]:
    """Return the sentences of a search in progress on its candidates, and on what its end adds."""
    last = (
        "Search items select the best candidate, so its score on them is too high on average: at the end it is tested on "
        f"{plural(view.objectives[0].test_items if len(view.objectives) == 1 else view.result.items.test, 'item')} that the search does not use."
    )
    return [*([wording.tried(view)] if view.result.trials else []), last]


_NONE = "No candidate is scored on all search items yet."


def _best(view: SearchView, objective: ObjectiveView) -> str:
    """Return the best candidate's score beside the best control's, on search items."""
    control = next(c for c in view.result.controls if c.name == view.result.best_control)
    beside = f"the best control, {control.name}, scores {wording.level(objective, control.scores[objective.index])}"
    steps = charts.best_so_far(view.searched, objective)
    if not steps:
        return f"{_NONE} On them, {beside}."
    number, score = steps[-1]
    name = next(c.name for c in view.searched if c.number == number)
    return f"The best so far, {name}, scores {wording.level(objective, score)} on search items, and {beside}."


def markdown(view: SearchView) -> str:
    """Return the whole report; text from users is escaped, so that it cannot start HTML, tables or code."""
    return text_of(_parts(view))


def tables(view: SearchView) -> list[Table]:
    """Return the report's tables."""
    return [part for part in _parts(view) if isinstance(part, Table)]


def _parts(view: SearchView) -> list[str | Table]:
    warnings = view.warnings
    partial = view.comparison.partial if view.comparison else None
    return [
        f"# {escape(wording.title(view))}",
        escape(wording.headline(view)),
        *([f"> **{escape(partial)}**"] if partial else []),
        *(escape(s) for s in wording.sentences(view)),
        *_result(view),
        *_tasks(view),
        *_history(view),
        *_importances(view),
        *_front(view),
        "## Reproduce",
        *_recipes(view),
        "This search:",
        fence(view.command, "sh"),
        bullets(f"{term}: {escape(text)}" for term, text in wording.facts(view)),
        *(["## Warnings", bullets(escape(w) for w in warnings)] if warnings else []),
    ]


def _result(view: SearchView) -> list[str | Table]:
    """Return the table of tested configurations."""
    if not view.tested:
        return []
    heads = ["Configuration", "Description"]
    for o in view.objectives:
        name = f"{o.name}: " if len(view.objectives) > 1 else ""
        heads += [f"{name}{word}" for word in ("search", "test", "optimism", f"against {view.result.best_control}", "verdict")]
    text = (
        "Differences are on test items, paired by item, with unadjusted 95 % intervals; above zero is better. Optimism: the difference on "
        "search items minus the difference on test items."
    )
    return ["## Result", Table("tested", heads, [_row(view, t) for t in view.tested], left=2), text]


def _row(view: SearchView, tested: TestedRow) -> list[str]:
    """Return the table row of a tested configuration."""
    cells = [tested.name, wording.notes(tested, view) or "control"]
    for o in view.objectives:
        paired, unit = view.against(tested, o), o.unit
        ends = (paired.test.low, paired.test.high) if paired else (None, None)
        diff, optimism = wording.difference(tested, view, o), tested.optimism[o.index]
        cells += [
            *(unit.cell(unit.score(half[o.index]), half[o.index]) for half in (tested.search, tested.test)),
            unit.cell(unit.diff(optimism), optimism),
            unit.cell(f"{unit.diff(diff)} {unit.diffs(*ends)}".strip(), diff, *ends),
            paired.verdict if paired else MISSING,
        ]
    return cells


def _tasks(view: SearchView) -> list[str | Table]:
    comparison = view.comparison
    return (
        [f"## Differences against {escape(comparison.baseline)}, task by task", differences(comparison)]
        if comparison and comparison.rows
        else []
    )


def _history(view: SearchView) -> list[str | Table]:
    """Return the table of all candidates, with the best score so far marked."""
    if not view.result.trials:
        return []
    best = {
        (c.random, n)
        for o in view.objectives
        for arm in (view.searched, view.drawn)
        for n, _ in best_so_far(arm, o)
        for c in arm[:1]
    }
    heads = ["TrialRow", *(d.name for d in view.dimensions), *(o.measure for o in view.objectives), "Items", "Result"]
    rows = []
    for c in view.result.trials:
        values = [written(c.values[d.name]) if d.name in c.values else MISSING for d in view.dimensions]
        scores = [_score(c, view, i) for i in range(len(view.objectives))]
        note = "best so far" if (c.random, c.number) in best else ""
        rows.append(
            [
                c.name,
                *values,
                *scores,
                Cell(count(c.items), {"": c.items}),
                ", ".join(p for p in (note, wording.fate(c, view)) if p),
            ]
        )
    intervals = "Brackets: the 95 % interval of the paired difference from the best control, added to the best control's score."
    notes = [intervals] if any(c.intervals for c in view.result.trials) else []
    notes += (
        ["≈ marks the estimated scores of candidates that were stopped early."]
        if any(c.stopped for c in view.result.trials)
        else []
    )
    return ["## TrialRows", Table("candidates", heads, rows), " ".join(notes)]


def _score(c: TrialRow, view: SearchView, index: int) -> str:
    objective = view.objectives[index]
    text = " ".join(p for p in ("≈" if c.stopped else "", wording.score(c, objective), wording.interval(c, objective)) if p)
    return objective.unit.cell(text, c.scores[index] if c.scores else None, *(ends_of(c, objective) or ()))


def _importances(view: SearchView) -> list[str | Table]:
    rows = [
        [name, dimension, PERCENT.cell(f"{PERCENT.score(share)} %", share)]
        for name, shares in view.result.importances.items()
        for dimension, share in by_share(shares)
    ]
    if not rows:
        return []
    text = "Share of the variation in scores that each dimension explains (PED-ANOVA)."
    return ["## Importance of dimensions", Table("importances", ["Objective", "Dimension", "Share"], rows, left=2), text]


def _front(view: SearchView) -> list[str]:
    """Return the Pareto front and its hypervolume; empty for one objective."""
    plot = pareto(view)
    if plot is None:
        return []
    text = f"TrialRows that no other candidate beats on both {listed(o.name for o in view.objectives)}: {listed(plot.front)}."
    areas = view.result.hypervolume
    area = [f"Hypervolume after {count(len(areas))} candidates: {areas[-1]:.4g}."] if areas else []
    return ["## Pareto front", escape(text), *area]


def _recipes(view: SearchView) -> list[str]:
    if not view.result.recipes:
        return []
    return [
        "Recipes written by the search:",
        fence("\n".join(f"workbench run {shell(path)}  # {name}" for name, path in view.result.recipes.items()), "sh"),
    ]
