"""The report of a search as Markdown: the page's tables and sentences, with tables in place of charts."""

from __future__ import annotations

from workbench.ground.errors import shell
from workbench.ground.numbers import MISSING, count, listed
from workbench.ground.tables import Cell, Table, fence, prose
from workbench.ground.tables import as_markdown as escape
from workbench.report.markdown import bullets, differences, text_of
from workbench.report.numbers import PERCENT
from workbench.search.pages import wording
from workbench.search.pages.charts import best_so_far, pareto
from workbench.search.pages.view import SearchView, written
from workbench.search.result import SearchState, TestedRow, TrialRow


def markdown(found: SearchState) -> str:
    """Return the whole report; text from users is escaped, so that it cannot start HTML, tables or code."""
    return text_of(_parts(SearchView.of(found)))


def tables(view: SearchView) -> list[Table]:
    """Return the report's tables."""
    return [part for part in _parts(view) if isinstance(part, Table)]


def _parts(view: SearchView) -> list[str | Table]:
    warnings = view.warnings
    partial = view.comparison.partial if view.comparison else None
    return [
        f"# {escape(wording.title(view))}",
        escape(wording.headline(view)),
        *([f"> **{prose(partial)}**"] if partial else []),
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
        bullets(f"{term}: {prose(text)}" for term, text in wording.facts(view)),
        *(["## Warnings", bullets(map(prose, warnings))] if warnings else []),
    ]


def _result(view: SearchView) -> list[str | Table]:
    """Return the table of tested configurations."""
    if not view.tested:
        return []
    heads = ["Configuration", "Description"]
    for o in view.objectives:
        name = f"{o.name}: " if len(view.objectives) > 1 else ""
        heads += [f"{name}{word}" for word in ("search", "test", "optimism", f"against {view.found.best_control}", "verdict")]
    text = (
        "Differences are on test items, paired by item, with unadjusted 95 % intervals; above zero is better. Optimism: the difference on "
        "search items minus the difference on test items."
    )
    return ["## Result", Table("tested", heads, [_row(view, t) for t in view.tested], left=2), text]


def _row(view: SearchView, tested: TestedRow) -> list[str]:
    """Return the table row of a tested configuration."""
    cells = [tested.name, wording.notes(tested, view) or "control"]
    for o in view.objectives:
        paired, unit = view.paired(tested, o), o.unit
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
    if not view.found.trials:
        return []
    best = {
        (c.random, n)
        for o in view.objectives
        for arm in (view.searched, view.drawn)
        for n, _ in best_so_far(arm, o)
        for c in arm[:1]
    }
    heads = ["Candidate", *(d.name for d in view.dimensions), *(o.measure for o in view.objectives), "Items", "Result"]
    rows = []
    for c in view.found.trials:
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
    notes = [intervals] if any(c.intervals for c in view.found.trials) else []
    notes += (
        ["≈ marks the estimated scores of candidates that were stopped early."]
        if any(c.stopped for c in view.found.trials)
        else []
    )
    return ["## Candidates", Table("candidates", heads, rows), " ".join(notes)]


def _score(c: TrialRow, view: SearchView, index: int) -> str:
    objective = view.objectives[index]
    text = " ".join(p for p in ("≈" if c.stopped else "", wording.score(c, objective), wording.interval(c, objective)) if p)
    return objective.unit.cell(text, c.scores[index] if c.scores else None, *(c.interval(index) or ()))


def _importances(view: SearchView) -> list[str | Table]:
    if not view.importances:
        return []
    rows = [
        [name, dimension, PERCENT.cell(f"{PERCENT.score(share)} %", share)]
        for name, shares in view.importances.items()
        for dimension, share in shares
    ]
    text = "Share of the variation in scores that each dimension explains (PED-ANOVA)."
    return ["## Importance of dimensions", Table("importances", ["Objective", "Dimension", "Share"], rows, left=2), text]


def _front(view: SearchView) -> list[str]:
    """Return the Pareto front and its hypervolume; empty for one objective."""
    plot = pareto(view)
    if plot is None:
        return []
    text = f"Candidates that no other candidate beats on both {listed(o.name for o in view.objectives)}: {listed(plot.front)}."
    areas = view.found.hypervolume
    area = [f"Hypervolume after {count(len(areas))} candidates: {areas[-1]:.4g}."] if areas else []
    return ["## Pareto front", escape(text), *area]


def _recipes(view: SearchView) -> list[str]:
    if not view.found.recipes:
        return []
    return [
        "Recipes written by the search:",
        fence("\n".join(f"workbench run {shell(path)}  # {name}" for name, path in view.found.recipes.items()), "sh"),
    ]
