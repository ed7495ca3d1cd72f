"""The page's view of two configurations side by side: packed questions and the answers of all configurations."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.report.numbers import count, plural
from workbench.report.view import View


@dataclass(frozen=True)
class BesideView:
    """Return the part of the page that shows answers side by side.

    Attributes:
        names: Configurations whose answers the page has.
        first: The configuration that is shown first: the baseline, if the page has its answers.
        second: The configuration beside it: the recommended one, else the best one.
        caption: Sentence on the items that the page has and has not.
        packed: Base64 of gzip of JSON: {"tasks": {task: [metric, lower, ratio]}, "configurations": [name],
            "items": [[task, id, cluster, prompt, gold, choices]], "answers": [[[score, text, log-likelihoods]]]}, answers by
            configuration and item, null where an item was not asked.
    """

    names: tuple[str, ...]
    first: str
    second: str
    caption: str
    packed: str


def beside(document: Mapping[str, Any], view: View) -> BesideView | None:
    """Return the view of answers side by side; None for older documents and where fewer than two configurations have answers."""
    found: Mapping[str, Any] = document.get("side_by_side") or {}
    answers: Mapping[str, Any] = found.get("answers") or {}
    items = found.get("items") or ()
    names = tuple(c.name for c in view.configurations if c.name in answers)
    if len(names) < 2 or not items:
        return None
    tasks = {t.name: [t.metric, t.lower, bool(t.ratio)] for t in view.tasks if t.contrast is None}
    payload = {
        "tasks": tasks,
        "configurations": names,
        "items": [[item.get(key) for key in ("task", "id", "cluster", "prompt", "gold", "choices")] for item in items],
        "answers": [answers[name] for name in names],
    }
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    first = view.baseline if view.baseline in names else names[0]
    return BesideView(
        names=names,
        first=first,
        second=_second(view, names, first),
        caption=_caption(len(items), int(found.get("differing") or len(items)), names),
        packed=base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii"),
    )


def _second(view: View, names: tuple[str, ...], first: str) -> str:
    recommended = (view.recommendation or {}).get("configuration")
    wanted = [recommended, *(c.name for c in view.by_mean), *names]
    return next(str(name) for name in wanted if name in names and name != first)


def _caption(held: int, differing: int, names: tuple[str, ...]) -> str:
    """Say which items the page has, and where the others are."""
    if held == differing:
        return f"The page has the {plural(held, 'item')} on which two configurations differ in score or text."
    return (
        f"The page has {count(held)} of the {count(differing)} items on which two configurations differ in score or text; different scores "
        f"come first. For all items: workbench scores items {names[0]} {names[-1]}, with the options of this comparison."
    )
