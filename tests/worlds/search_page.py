"""The page of a search as tests read it, and a search whose numbers are easy to compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.report.search.page import render
from workbench.report.search.view import SearchView, search_of
from workbench.search.result import GrowingSearch, SearchResult, SearchState

Document = dict[str, Any]


def result_of(document: Document) -> SearchResult:
    return SearchResult.of(document, "made")


def state_of(document: Document) -> SearchState:
    """A search that may be in progress."""
    return GrowingSearch.of(document, "made") if "progress" in document else result_of(document)


def view_of(document: Document) -> SearchView:
    return search_of(state_of(document))


def rendered(document: Document, folder: Path) -> tuple[str, str]:
    page, markdown, _ = render(result_of(document), folder / "search.html")
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
    gaps = [
        {"diff": d, "low": low, "high": high, "p": 0.1, "clusters": 8} for d, low, high in ((0.25, 0.05, 0.45), (0.4, 0.1, 0.7))
    ]
    return {
        "version": 1, "name": "hand", "key": "0" * 32, "directory": "runs/search/hand", "command": None, "sampler": "tpe", "seed": 0,
        "objectives": [{"name": "acc", "lower": False, "terms": [["s", "t", "acc"]], **counts}],
        "space": {"m": {"choices": ["a", "b"]}, "lam": {"low": 1.0, "high": 3.0, "log": False}, "d": {"low": 0.001, "high": 0.1, "log": True}},
        "items": {"search": 8, "test": 20}, "stages": [4, 4],
        "controls": [{"name": "base", "role": "base", "scores": [0.2], "intervals": [None]}],
        "trials": trials, "importances": {}, "winner": "trial-2", "recipes": {}, "best_control": "base", "warnings": [],
        "test": {
            "baseline": "base", "comparison": {},
            "rows": [{"name": "base", "part": "control", "search": [0.2], "test": [0.25], "optimism": [0.0], "digest": "b", "same_as": None},
                     {"name": "trial-2", "part": "found", "search": [0.6], "test": [0.5], "optimism": [0.15], "digest": "t", "same_as": None}],
            "against": {"trial-2": [{"objective": "acc", "test": gaps[0], "search": gaps[1], "verdict": "cannot tell", "reason": None, "optimism": 0.15}]},
        },
    }  # fmt: skip
