"""The page of a search."""

from __future__ import annotations

from workbench.ground.numbers import MISSING, count, listed, plural
from workbench.report import provenance
from workbench.report.files import with_tables
from workbench.report.page import Viewer, differences, filled
from workbench.search.pages import charts, parallel, wording
from workbench.search.pages.markdown import tables
from workbench.search.pages.view import ObjectiveView, SearchView, written
from workbench.search.result import SearchProgress, SearchState, TestedPart, TestedRow

SCRIPTS = ("report.js", "downloads.js")
STYLES = ("report.css", "search.css")


def html(found: SearchState, viewer: Viewer | None = None) -> str:
    """Return the HTML page of a search, finished or in progress, as text; the template escapes all values of the document.

    Args:
        found: The search.
        viewer: The viewer that shows the page; None for a file.
    """
    view = SearchView.of(found)
    comparison = view.comparison if view.comparison is not None and view.comparison.rows else None
    context = {
        "search": view,
        "title": wording.title(view),
        "viewer": viewer,
        "headline": _headline(view, view.progress) if view.progress else wording.headline(view),
        "sentences": _sentences(view) if view.progress else wording.sentences(view),
        "suites": view.comparison.provenance.suites if view.comparison else [],
        "created": provenance.created(view.comparison) if view.comparison else "",
        "partial": view.comparison.partial if view.comparison else None,
        "warnings": view.warnings,
        "groups": [group for group in (_tested(view, "found", "random"), _tested(view, "control")) if group],
        "notes": lambda tested: wording.notes(tested, view),
        "difference": lambda tested, objective: wording.difference(tested, view, objective),
        "fate": lambda candidate: wording.fate(candidate, view),
        "score": wording.score,
        "interval": wording.interval,
        "written": written,
        "missing": MISSING,
        "histories": charts.history(view),
        "bars": charts.importances(view),
        "parallel": parallel.parallel(view),
        "whiskers": any(c.intervals for c in view.found.trials),
        "curves": charts.curves(view),
        "pareto": charts.pareto(view),
        "hypervolume": charts.hypervolume(view),
        "facts": wording.facts(view),
        "stopped": any(c.stopped for c in view.found.trials),
        "failed": any(c.failed for c in view.found.trials),
        "forest": comparison is not None,
        "many": False,
        **(differences(comparison) if comparison is not None else {}),
    }
    return with_tables(filled("search.html.j2", context, SCRIPTS, STYLES, __package__), tables(view))


def _tested(view: SearchView, *parts: TestedPart) -> list[TestedRow]:
    """Return the tested configurations of some parts, the chosen ones or the best control first."""
    tested = [t for t in view.tested if t.part in parts]
    return sorted(tested, key=lambda t: (t.name not in view.chosen, t.name != view.found.best_control))


def _headline(view: SearchView, progress: SearchProgress) -> str:
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
        f"{plural(view.objectives[0].test_items if len(view.objectives) == 1 else view.found.items.test, 'item')} that the search does not use."
    )
    return [*([wording.tried(view)] if view.found.trials else []), last]


_NONE = "No candidate is scored on all search items yet."


def _best(view: SearchView, objective: ObjectiveView) -> str:
    """Return the best candidate's score beside the best control's, on search items."""
    control = next(c for c in view.found.controls if c.name == view.found.best_control)
    beside = f"the best control, {control.name}, scores {wording.level(objective, control.scores[objective.index])}"
    steps = charts.best_so_far(view.searched, objective)
    if not steps:
        return f"{_NONE} On them, {beside}."
    number, score = steps[-1]
    name = next(c.name for c in view.searched if c.number == number)
    return f"The best so far, {name}, scores {wording.level(objective, score)} on search items, and {beside}."
