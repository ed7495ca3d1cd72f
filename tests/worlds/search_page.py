"""The page of a search as tests read it, and a search whose numbers are easy to compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from worlds.search_document import compared

if TYPE_CHECKING:
    from workbench.search.pages.view import SearchView

Document = dict[str, Any]


def view_of(document: Document) -> SearchView:
    from workbench.search.pages.view import SearchView
    from workbench.search.result import SearchResult

    return SearchView.of(SearchResult.of(document, "search.json"))


def render(document: Document, out: Path) -> list[Path]:
    from workbench.search import pages
    from workbench.search.result import SearchResult

    return pages.render(SearchResult.of(document, "search.json"), out)


def rendered(document: Document, folder: Path) -> tuple[str, str]:
    page, markdown, _ = render(document, folder / "search.html")
    return page.read_text("utf-8"), markdown.read_text("utf-8")


def handmade() -> Document:
    """Four candidates whose scores and places are easy to compute."""
    trials = [
        {"arm": "search", "number": 0, "name": "trial-0", "values": {"m": "a", "lam": 1.0}, "scores": [0.4], "items": 8, "stopped": False},
        {"arm": "search", "number": 1, "name": "trial-1", "values": {"m": "b", "lam": 2.0, "d": 0.1}, "scores": [0.9], "items": 4, "stopped": True, "beaten_by": "base"},
        {"arm": "search", "number": 2, "name": "trial-2", "values": {"m": "b", "lam": 3.0, "d": 0.01}, "scores": [0.6], "items": 8, "stopped": False},
        {"arm": "search", "number": 3, "name": "trial-3", "values": {"m": "a", "lam": 1.5}, "scores": None, "error": "not finite"},
        {"arm": "search", "number": 4, "name": "trial-4", "values": {"m": "a", "lam": 1.2}, "scores": [0.5], "items": 8, "stopped": False},
    ]  # fmt: skip
    counts = {"items": {"search": 8, "test": 8}, "clusters": {"search": 8, "test": 8}}
    return {
        "version": 1, "name": "hand", "key": "0" * 32, "directory": "runs/search/hand-00000000", "command": None, "sampler": "tpe", "seed": 0,
        "objectives": [{"name": "acc", "lower": False, "terms": [["s", "t", "acc"]], **counts}],
        "space": {"m": {"choices": ["a", "b"]}, "lam": {"low": 1.0, "high": 3.0}, "d": {"low": 0.001, "high": 0.1, "log": True}},
        "items": {"search": 8, "test": 20}, "stages": [8], "controls": [control("base", 0.2)], "trials": trials, "importances": {},
        "winner": "trial-2", "recipes": {}, "best_control": "base", "warnings": [],
        "test": {
            "baseline": "base",
            "rows": [scored_row("base", "control", 0.2, 0.25, 0.0), scored_row("trial-2", "found", 0.6, 0.5, 0.15)],
            "against": {"trial-2": [{"objective": "acc", "test": {"diff": 0.25, "low": 0.05, "high": 0.45, "p": 0.02, "clusters": 8},
                                     "search": {"diff": 0.4, "low": 0.1, "high": 0.7, "p": 0.01, "clusters": 8},
                                     "verdict": "cannot tell", "reason": None, "optimism": 0.15}]},
            "comparison": {**compared([]), "rows": []},
        },
    }  # fmt: skip


def control(name: str, score: float) -> Document:
    return {"name": name, "role": "base" if name == "base" else "average", "scores": [score], "intervals": [None]}


def scored_row(name: str, part: str, search: float, test: float, optimism: float) -> Document:
    row = {"name": name, "part": part, "digest": "0" * 32, "search": [search], "test": [test], "optimism": [optimism]}
    return {**row, "same_as": None}
