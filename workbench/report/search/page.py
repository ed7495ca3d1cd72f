"""Rendering of a search's document as HTML, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.compare.comparison import Comparison
from workbench.report import forest, numbers, provenance
from workbench.report.page import filled, write_files
from workbench.report.search import dimensions, growing, history, parallel, pareto, wording
from workbench.report.search.markdown import markdown
from workbench.report.search.reading import finite, search_of
from workbench.report.search.view import SearchView, written

SCRIPTS = ("report.js", "downloads.js")
STYLES = ("report.css", "search.css")


def render(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write <out>.html, <out>.md and <out>.json and return their paths in that order.

    Each file is replaced as a whole. The HTML page needs no other file and makes no request. The JSON file is the document, with NaN and
    infinities as null.

    Args:
        document: The content of search.json.
        out: Path of the files; it may end in one of the three suffixes.
    """
    document = finite(document)
    view = search_of(document)
    return write_files(out, html(view), markdown(view), document)


def page_text(document: Mapping[str, Any]) -> str:
    """Return the HTML page of a search's document as text."""
    return html(search_of(finite(document)))


def growing_page(document: Mapping[str, Any], watched: int) -> str:
    """Return the HTML page of a search that a server shows while the search runs, and at its end.

    Args:
        document: The document of the search, in progress or finished.
        watched: Number of the page, which the page compares with the server's.
    """
    return html(search_of(finite(document)), watched)


def html(view: SearchView, watched: int | None = None) -> str:
    """Return the page as text; the template escapes all values of the document.

    Args:
        view: The search.
        watched: Number of the page if a server shows it (`report.watch`); None for a file.
    """
    comparison = view.comparison if view.comparison is not None and view.comparison.rows else None
    context = {
        "search": view,
        "title": wording.title(view),
        "watched": watched,
        "headline": growing.headline(view, view.progress) if view.progress else wording.headline(view),
        "sentences": growing.sentences(view) if view.progress else wording.sentences(view),
        "suites": view.comparison.provenance.suites if view.comparison else [],
        "created": provenance.created(view.comparison) if view.comparison else "",
        "partial": view.comparison.partial if view.comparison else None,
        "warnings": view.warnings,
        "groups": [group for group in (_tested(view, "candidate", "random"), _tested(view, "control")) if group],
        "notes": lambda tested: wording.notes(tested, view),
        "difference": lambda tested, objective: wording.difference(tested, view, objective),
        "fate": lambda candidate: wording.fate(candidate, view),
        "score": wording.score,
        "interval": wording.interval,
        "written": written,
        "missing": numbers.MISSING,
        "histories": history.history(view),
        "bars": dimensions.importances(view),
        "parallel": parallel.parallel(view),
        "whiskers": any(c.intervals for c in view.candidates),
        "curves": dimensions.curves(view),
        "pareto": pareto.pareto(view),
        "hypervolume": history.hypervolume(view),
        "facts": wording.facts(view),
        "stopped": any(c.stopped for c in view.candidates),
        "failed": any(c.failed for c in view.candidates),
        "forest": comparison is not None,
        **(_comparison(comparison) if comparison is not None else {}),
    }
    return filled("search.html.j2", context, SCRIPTS if watched is None else (*SCRIPTS, "watch.js"), STYLES)


def _tested(view: SearchView, *kinds: str) -> list[Any]:
    """Return the tested configurations of some kinds, the chosen ones or the best control first."""
    tested = [t for t in view.tested if t.kind in kinds]
    return sorted(tested, key=lambda t: (t.name not in view.chosen, t.name != view.best_control))


def _comparison(view: Comparison) -> dict[str, Any]:
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
