"""Answers of configurations side by side, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Literal

import numpy as np

from workbench.compare.tables import Table, configurations_of, named, suites_of, tables_of
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.files import is_number
from workbench.scores.store import Configuration, Row, Scores, ScoreStore

Change = Literal["won", "lost", "same"]
BUDGET = 1_500_000
"""Largest number of characters of JSON that a comparison's document spends on answers side by side."""
Short = tuple[Number | list[Number] | None, str | None, list[Measured] | None]
"""Score, text and log-likelihoods of an answer."""


class Question(JsonObject):
    """An item of a task."""

    task: str
    """Name of the task."""
    id: str
    """Name of the item within the task."""
    cluster: str | None
    """Cluster of the item."""
    prompt: str | None
    """Prompt that all configurations were given."""
    gold: str | int | list[int] | None
    """The right answer: a text, or the index of the right choice, or several indices."""
    choices: list[str] | None
    """Choices of the item, if it has any."""


class SideBySide(JsonObject):
    """Answers of all configurations to items on which two of them differ."""

    items: list[Question]
    """The questions."""
    answers: dict[str, list[Short | None]]
    """Configuration -> its answer to each item; null where it was not asked."""
    differing: int
    """Number of items on which two configurations differ."""
    left_out: int
    """Number of these that are not among the items."""


class Answer(JsonObject):
    """A configuration's answer to an item."""

    score: Number | list[Number] | None
    """Score by the task's primary metric; numerator and weight for a ratio of sums; contribution to a metric of all items together."""
    response: str | None
    """Generated text; null if the task does not generate any."""
    picked: int | None
    """Index of the choice that the model answers; null for a task without choices."""
    loglikelihoods: list[Number] | None
    """Log-likelihoods of the choices or texts, in nats; null for generated text."""


class Item(Question):
    """An item with the answers of two configurations."""

    metric: str
    """Primary metric of the task."""
    change: Change
    """Change from the first configuration to the second one: the item is won, lost, or has the same score."""
    first: Answer
    """Answer of the first configuration."""
    second: Answer
    """Answer of the second configuration."""

    @property
    def differs(self) -> bool:
        """True if score or answer differs."""
        one, two = self.first, self.second
        return self.change != "same" or (one.response, one.picked) != (two.response, two.picked)


class Items(JsonObject):
    """Answers of two configurations, item by item."""

    first: str
    """Name of the first configuration."""
    second: str
    """Name of the second configuration."""
    items: int
    """Number of items of the tasks that were asked for."""
    won: int
    """Number of items with a better score of the second configuration."""
    lost: int
    """Number of items with a worse score of the second configuration."""
    same: int
    """Number of items with the same score."""
    shown: list[Item]
    """The items that the options select."""


def paired_answers(store: ScoreStore, scores: Sequence[Scores], first: str, second: str) -> list[Item]:
    """Return all items that two configurations answered, with both answers.

    Args:
        store: The store that holds the scores.
        scores: Stored scores, those of the two configurations among them.
        first: Name of the first configuration.
        second: Name of the second configuration.

    Raises:
        WorkbenchError: If one of them is not scored, or they were scored under different plans.
    """
    settings = suites_of(store, scores, {})
    entries = configurations_of(scores, first)
    two = [named(entries, name) for name in (first, second)]
    digests = {c.digest for c in two}
    own = [s for s in scores if s.configuration.digest in digests]
    tables = tables_of(store, own, {name: suite for name, suite in settings.items() if any(s.suite == name for s in own)})
    return [item for t in tables if _answered(t, digests) for item in _items(t, two[0].digest, two[1].digest)]


def change(table: Table, before: float, after: float) -> Change:
    """Return "won", "lost" or "same" for an item's values of the primary metric.

    The values of a ratio of sums are log-likelihoods, of which the higher is better although the ratio is lower.
    """
    if before == after:
        return "same"
    return "won" if (after > before) != (table.lower and table.ratio is None) else "lost"


def picked(row: Row, item: Row, metric: str) -> int | None:
    """Return the index of the choice that a model answers: the most likely one, by length where the metric says so.

    Args:
        row: Row of the configuration's answer.
        item: Row of the question.
        metric: Primary metric of the task.
    """
    values, choices = row.get("loglikelihoods"), item.get("choices")
    if not values or not choices or len(values) != len(choices):
        return None
    sizes = {"acc_norm": [len(str(c)) for c in choices], "acc_bytes": [len(str(c).encode()) for c in choices]}.get(metric)
    shares = [v / max(1, n) for v, n in zip(values, sizes, strict=True)] if sizes else list(values)
    return int(np.argmax(shares))


def side_by_side(tables: Sequence[Table], configurations: Sequence[Configuration], budget: int = BUDGET) -> SideBySide:
    """Return the answers of all configurations to items on which two of them differ, for a view that compares any two.

    Items whose scores differ come before those whose texts alone differ; all tasks take turns, until the budget is spent.

    Args:
        tables: Tables of all tasks.
        configurations: The configurations; of those with equal weights, only the first one is kept.
        budget: Largest number of characters of JSON.
    """
    shown = list({c.digest: c for c in reversed(configurations)}.values())[::-1]
    wanted = [[(t, i) for i in order] for t in tables if t.rows for order in _differing(t, [c.digest for c in shown])]
    scored, worded = wanted[0::2], wanted[1::2]
    items: list[Question] = []
    answers: dict[str, list[Short | None]] = {c.name: [] for c in shown}
    spent = 0
    for t, i in chain(_turns(scored), _turns(worded)):
        question = question_of(t.items[i])
        row = [_short(t.rows[c.digest][i], t.metric) if c.digest in t.rows else None for c in shown]
        spent += len(json.dumps([question.to_dict(), row], ensure_ascii=False))
        if spent > budget:
            break
        items.append(question)
        for name, answer in zip(answers, row, strict=True):
            answers[name].append(answer)
    differing = sum(map(len, wanted))
    return SideBySide(items=items, answers=answers, differing=differing, left_out=differing - len(items))


def _answered(table: Table, digests: set[str]) -> bool:
    """Return True if a table holds answers of all these configurations; contrasts hold none."""
    return digests <= table.rows.keys()


def question_of(item: Row) -> Question:
    """Return the question of a stored item."""
    return Question(**{key: item.get(key) for key in Question.model_fields})


def _items(table: Table, first: str, second: str) -> Iterator[Item]:
    for i, item in enumerate(table.items):
        before, after = table.rows[first][i], table.rows[second][i]
        yield Item(
            **dict(question_of(item)),
            metric=table.metric,
            change=change(table, float(table.values[first][i]), float(table.values[second][i])),
            first=_answer(before, item, table.metric),
            second=_answer(after, item, table.metric),
        )


def _answer(row: Row, item: Row, metric: str) -> Answer:
    return Answer(
        score=row["metrics"].get(metric),
        response=row.get("response"),
        picked=picked(row, item, metric),
        loglikelihoods=row.get("loglikelihoods"),
    )


def _short(row: Row, metric: str) -> Short:
    """Return score, text and log-likelihoods with rounded numbers."""
    logs = row.get("loglikelihoods")
    short = None if logs is None else [round(float(x), 4) if is_number(x) else None for x in logs]
    return row["metrics"].get(metric), row.get("response"), short


def _differing(table: Table, digests: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the items whose scores differ between two configurations, and those of which only the texts do."""
    own = [d for d in digests if d in table.rows]
    if len(own) < 2:
        return [], []
    values = np.stack([table.values[d] for d in own])
    scored = (values != values[0]).any(axis=0)
    worded = [i for i in np.flatnonzero(~scored).tolist() if len({table.rows[d][i].get("response") for d in own}) > 1]
    return np.flatnonzero(scored).tolist(), worded


def _turns(parts: Sequence[Sequence[tuple[Table, int]]]) -> Iterator[tuple[Table, int]]:
    """Yield one item of each task in turn."""
    for turn in zip_longest(*parts):
        yield from (one for one in turn if one is not None)
