"""The page of a search as tests read it, and a search whose numbers are easy to compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.report.search import render
from workbench.report.search.reading import finite, search_of
from workbench.report.search.view import SearchView

Document = dict[str, Any]


def view_of(document: Document) -> SearchView:
    return search_of(finite(document))


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
    return {
        "version": 1, "name": "hand",
        "objectives": [{"name": "acc", "lower": False, "terms": [["s", "t", "acc"]], "items": {"search": 8, "test": 8}}],
        "space": {"m": {"choices": ["a", "b"]}, "lam": {"low": 1.0, "high": 3.0}, "d": {"low": 0.001, "high": 0.1, "log": True}},
        "items": {"search": 8, "test": 20}, "controls": [{"name": "base", "scores": [0.2]}], "trials": trials, "winner": "trial-2",
        "best_control": "base",
        "test": {
            "rows": [{"name": "base", "part": "control", "search": [0.2], "test": [0.25], "optimism": [0.0]},
                     {"name": "trial-2", "part": "found", "search": [0.6], "test": [0.5], "optimism": [0.15]}],
            "against": {"trial-2": [{"objective": "acc", "test": {"diff": 0.25, "low": 0.05, "high": 0.45, "clusters": 8},
                                     "search": {"diff": 0.4, "low": 0.1, "high": 0.7, "clusters": 8}, "verdict": "cannot tell", "optimism": 0.15}]},
        },
    }  # fmt: skip
