"""Changed items: counts by configuration and task, and the packed rows of the page's item browser."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.report.view import TaskView, View


@dataclass(frozen=True)
class Count:
    """Number of changed items of one configuration on one task; `other` counts items whose score is equal or unknown."""

    gained: int = 0
    lost: int = 0
    other: int = 0

    def plus(self, direction: str) -> Count:
        """Return the counts with one more item in a direction."""
        return Count(*(getattr(self, k) + (k == direction) for k in ("gained", "lost", "other")))


def counts(document: Mapping[str, Any], view: View) -> dict[str, dict[str, Count]]:
    """Count changed items by configuration and task, without configurations that have no items in the document."""
    tasks = {t.name: t for t in view.tasks}
    flips = document.get("flips") or {}
    table: dict[str, dict[str, Count]] = {}
    for configuration in view.configurations:
        if configuration.name in flips:
            row = table.setdefault(configuration.name, {})
            for flip in flips[configuration.name] or ():
                task = str(flip["task"])
                row[task] = row.get(task, Count()).plus(direction(flip, tasks.get(task)))
    return table


def direction(flip: Mapping[str, Any], task: TaskView | None) -> str:
    """Return "gained" or "lost" by the task's primary metric, or "other" if the score is equal or unknown."""
    before = _score(flip.get("baseline"), task)
    after = _score(flip.get("configuration"), task)
    if before is None or after is None or before == after:
        return "other"
    return "gained" if after > before else "lost"


def pack(document: Mapping[str, Any], view: View) -> str:
    """Return the rows of the page's item browser as base64 of gzip of JSON; each item and the baseline's answer occur once.

    The JSON is {"baseline", "tasks": {task: metric}, "configurations": [name],
    "items": [[task, id, cluster, prompt, gold, choices, answer]],
    "flips": [[configuration, item, direction, answer]]}
    with answer = [response, metrics, log-likelihoods].
    """
    tasks = {t.name: t for t in view.tasks}
    flips = document.get("flips") or {}
    names = [c.name for c in view.configurations if c.name in flips]
    index: dict[tuple[str, str], int] = {}
    items: list[list[Any]] = []
    rows: list[list[Any]] = []
    for c, name in enumerate(names):
        for flip in flips[name] or ():
            key = (str(flip["task"]), str(flip["id"]))
            if key not in index:
                index[key] = len(items)
                fields = [flip.get(k) for k in ("cluster", "prompt", "gold", "choices")]
                items.append([*key, *fields, _answer(flip.get("baseline"))])
            rows.append([c, index[key], direction(flip, tasks.get(key[0])), _answer(flip.get("configuration"))])
    payload = {
        "baseline": view.baseline,
        "tasks": {t.name: t.metric for t in view.tasks if t.contrast is None},
        "configurations": names,
        "items": items,
        "flips": rows,
    }
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _score(answer: Mapping[str, Any] | None, task: TaskView | None) -> float | None:
    """Return an item's score with higher as better; for a ratio metric, the log-likelihood divided by the weight."""
    value = ((answer or {}).get("metrics") or {}).get(task.metric if task else None)
    if isinstance(value, list | tuple) and len(value) == 2 and value[1]:
        return float(value[0]) / float(value[1])
    if not isinstance(value, int | float):
        return None
    return -float(value) if task and task.lower else float(value)


def _answer(answer: Mapping[str, Any] | None) -> list[Any]:
    answer = answer or {}
    logs = answer.get("loglikelihoods")
    short = None if logs is None else [None if x is None else round(float(x), 4) for x in logs]
    return [answer.get("response"), answer.get("metrics") or {}, short]
