"""Items on the page, packed for its scripts: changed ones with their counts, and answers of two configurations side by side."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass

from workbench.compare.comparison import ChangedItem, ComparedTask, Comparison, StoredAnswer
from workbench.ground.numbers import count, plural


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


def beside(view: Comparison) -> BesideView | None:
    """Return the view of answers side by side; None where fewer than two configurations have answers."""
    found = view.side_by_side
    names = tuple(c.name for c in view.by_role if c.name in found.answers)
    if len(names) < 2 or not found.items:
        return None
    tasks = {t.name: [t.metric, t.lower, bool(t.ratio)] for t in view.tasks if t.contrast is None}
    payload = {
        "tasks": tasks,
        "configurations": names,
        "items": [[item.task, item.id, item.cluster, item.prompt, item.gold, item.choices] for item in found.items],
        "answers": [found.answers[name] for name in names],
    }
    first = view.baseline if view.baseline in names else names[0]
    return BesideView(
        names=names,
        first=first,
        second=_second(view, names, first),
        caption=_caption(len(found.items), found.differing, names),
        packed=packed(payload),
    )


def packed(payload: object) -> str:
    """Return JSON as the base64 of its gzip, which the page's scripts unpack."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _second(view: Comparison, names: tuple[str, ...], first: str) -> str:
    recommended = view.recommendation.configuration if view.recommendation else None
    wanted = [recommended, *(c.name for c in view.by_mean), *names]
    return next(name for name in wanted if name in names and name != first)


def _caption(held: int, differing: int, names: tuple[str, ...]) -> str:
    """Say which items the page has, and where the others are."""
    if held == differing:
        return f"The page has the {plural(held, 'item')} on which two configurations differ in score or text."
    return (
        f"The page has {count(held)} of the {count(differing)} items on which two configurations differ in score or text; different scores "
        f"come first. For all items: workbench scores items {names[0]} {names[-1]}, with the options of this comparison."
    )


@dataclass(frozen=True)
class Count:
    """Number of changed items of one configuration on one task; `other` counts items whose score is equal or unknown."""

    gained: int = 0
    lost: int = 0
    other: int = 0

    def plus(self, direction: str) -> Count:
        """Return the counts with one more item in a direction."""
        return Count(*(getattr(self, k) + (k == direction) for k in ("gained", "lost", "other")))


def counts(view: Comparison) -> dict[str, dict[str, Count]]:
    """Count changed items by configuration and task, without configurations that have no items in the document."""
    tasks = {t.name: t for t in view.tasks}
    table: dict[str, dict[str, Count]] = {}
    for configuration in view.by_role:
        if configuration.name in view.flips:
            row = table.setdefault(configuration.name, {})
            for flip in view.flips[configuration.name]:
                row[flip.task] = row.get(flip.task, Count()).plus(direction(flip, tasks.get(flip.task)))
    return table


def direction(flip: ChangedItem, task: ComparedTask | None) -> str:
    """Return "gained" or "lost" by the task's primary metric, or "other" if the score is equal or unknown."""
    before, after = _score(flip.baseline, task), _score(flip.configuration, task)
    if before is None or after is None or before == after:
        return "other"
    return "gained" if after > before else "lost"


def pack(view: Comparison) -> str:
    """Return the rows of the page's item browser as base64 of gzip of JSON; each item and the baseline's answer occur once.

    The JSON is {"baseline", "tasks": {task: metric}, "configurations": [name],
    "items": [[task, id, cluster, prompt, gold, choices, answer]],
    "flips": [[configuration, item, direction, answer]]}
    with answer = [response, metrics, log-likelihoods].
    """
    tasks = {t.name: t for t in view.tasks}
    names = [c.name for c in view.by_role if c.name in view.flips]
    index: dict[tuple[str, str], int] = {}
    items: list[list[object]] = []
    rows: list[list[object]] = []
    for c, name in enumerate(names):
        for flip in view.flips[name]:
            key = (flip.task, flip.id)
            if key not in index:
                index[key] = len(items)
                items.append([*key, flip.cluster, flip.prompt, flip.gold, flip.choices, _answer(flip.baseline)])
            rows.append([c, index[key], direction(flip, tasks.get(flip.task)), _answer(flip.configuration)])
    return packed(
        {
            "baseline": view.baseline,
            "tasks": {t.name: t.metric for t in view.tasks if t.contrast is None},
            "configurations": names,
            "items": items,
            "flips": rows,
        }
    )


def _score(answer: StoredAnswer, task: ComparedTask | None) -> float | None:
    """Return an item's score with higher as better; for a ratio metric, the log-likelihood divided by the weight."""
    value = answer.metrics.get(task.metric) if task else None
    if isinstance(value, list):
        return value[0] / value[1] if len(value) == 2 and value[1] else None
    if value is None:
        return None
    return -float(value) if task and task.lower else float(value)


def _answer(answer: StoredAnswer) -> list[object]:
    logs = answer.loglikelihoods
    return [answer.response, answer.metrics, None if logs is None else [round(float(x), 4) for x in logs]]
