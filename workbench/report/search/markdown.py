"""The report of a search as Markdown: the same tables and sentences; what is drawn there is a table here."""

from __future__ import annotations

from workbench.errors import shell
from workbench.report.markdown import bullets, differences, escape, fence, table
from workbench.report.numbers import MISSING, PERCENT, count, listed
from workbench.report.search import pareto, wording
from workbench.report.search.history import best_so_far
from workbench.report.search.view import Candidate, SearchView, TestedView, written


def markdown(view: SearchView) -> str:
    """The whole report; user text is escaped so that it cannot open HTML, tables or code."""
    warnings = view.warnings
    partial = view.comparison.partial if view.comparison else None
    parts = [
        f"# {escape(wording.title(view))}",
        escape(wording.headline(view)),
        *([f"> **{escape(partial)}**"] if partial else []),
        *(escape(s) for s in wording.sentences(view)),
        *_result(view),
        *_tasks(view),
        *_history(view),
        *_importances(view),
        *_front(view),
        "## How to repeat it",
        *_recipes(view),
        "The search again:",
        fence(view.command, "sh"),
        bullets(f"{term}: {escape(text)}" for term, text in wording.facts(view)),
        *(["## Warnings", bullets(escape(w) for w in warnings)] if warnings else []),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _result(view: SearchView) -> list[str]:
    if not view.tested:
        return []
    heads = ["Configuration", "What it is"]
    for o in view.objectives:
        name = f"{o.name}: " if len(view.objectives) > 1 else ""
        heads += [
            f"{name}{word}" for word in ("search", "test", "flattered by", f"against {view.best_control or MISSING}", "verdict")
        ]
    text = (
        "Differences are on test items, with plain 95 % intervals, paired by item; above zero is better. “Flattered by”: how much larger "
        "the difference is on search items."
    )
    return ["## Result", table(heads, (_row(view, t) for t in view.tested), left=2), text]


def _row(view: SearchView, t: TestedView) -> list[str]:
    cells = [t.name, wording.notes(t, view) or "control"]
    for o in view.objectives:
        found, unit = t.against[o.index], o.unit
        ends = unit.diffs(found.low, found.high) if found else ""
        cells += [unit.score(t.search[o.index]), unit.score(t.test[o.index]), unit.diff(t.optimism[o.index]),
                  f"{unit.diff(wording.difference(t, view, o))} {ends}".strip(), (found and found.verdict) or MISSING]  # fmt: skip
    return cells


def _tasks(view: SearchView) -> list[str]:
    found = view.comparison
    return [f"## Differences against {escape(found.baseline)}, task by task", differences(found)] if found and found.rows else []


def _history(view: SearchView) -> list[str]:
    if not view.candidates:
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
    for c in view.candidates:
        values = [written(c.values[d.name]) if d.name in c.values else MISSING for d in view.dimensions]
        scores = [_score(c, view, i) for i in range(len(view.objectives))]
        told = "best so far" if (c.random, c.number) in best else ""
        rows.append([c.name, *values, *scores, count(c.items), ", ".join(p for p in (told, wording.fate(c, view)) if p)])
    intervals = ["In brackets the 95 % interval of the paired difference from the best control, around the score."]
    found = intervals if any(c.intervals for c in view.candidates) else []
    found += ["≈ stands before estimates of candidates that were given up."] if any(c.stopped for c in view.candidates) else []
    return ["## Candidates", table(heads, rows), " ".join(found)]


def _score(c: Candidate, view: SearchView, index: int) -> str:
    objective = view.objectives[index]
    return " ".join(p for p in ("≈" if c.stopped else "", wording.score(c, objective), wording.interval(c, objective)) if p)


def _importances(view: SearchView) -> list[str]:
    if not view.importances:
        return []
    rows = [
        [name, dimension, f"{PERCENT.score(share)} %"] for name, shares in view.importances.items() for dimension, share in shares
    ]
    text = "Share of the spread of scores that a dimension explains (PED-ANOVA)."
    return ["## Importance of dimensions", table(["Objective", "Dimension", "Share"], rows, left=2), text]


def _front(view: SearchView) -> list[str]:
    found = pareto.pareto(view)
    if found is None:
        return []
    text = f"No other candidate beats on both {listed(o.name for o in view.objectives)}: {listed(found.front)}."
    area = (
        [f"Hypervolume after {count(len(view.hypervolume))} candidates: {view.hypervolume[-1]:.4g}."] if view.hypervolume else []
    )
    return ["## Pareto front", escape(text), *area]


def _recipes(view: SearchView) -> list[str]:
    if not view.recipes:
        return []
    return [
        "Recipes that the search wrote:",
        fence("\n".join(f"workbench run {shell(path)}  # {name}" for name, path in view.recipes.items()), "sh"),
    ]
