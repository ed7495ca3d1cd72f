"""Answers of configurations side by side, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from workbench.compare.tables import Table, configurations_of, named, suites_of, tables_of
from workbench.scores.files import is_number
from workbench.scores.store import Configuration, Row, Scores, ScoreStore

WON, LOST, SAME = "won", "lost", "same"
BUDGET = 1_500_000
"""Largest number of characters of JSON that a comparison's document spends on answers side by side."""
_QUESTION = ("task", "id", "cluster", "prompt", "gold", "choices")


def beside(store: ScoreStore, scores: Sequence[Scores], first: str, second: str) -> list[dict[str, Any]]:
    """Return all items that two configurations answered, with both answers.

    Args:
        store: The store that holds the scores.
        scores: Stored scores, those of the two configurations among them.
        first: Name of the first configuration.
        second: Name of the second configuration.

    Returns:
        One entry for each item: the question, `metric` (the task's primary one), the answers `first` and `second`, and `change`: whether
        the second won or lost the item against the first, or has the same score; `differs` is true if score or answer differs.

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


def change(table: Table, before: float, after: float) -> str:
    """Return "won", "lost" or "same" for an item's values of the primary metric.

    The values of a ratio of sums are log-likelihoods, of which the higher is better although the ratio is lower.
    """
    if before == after:
        return SAME
    return WON if (after > before) != (table.lower and table.ratio is None) else LOST


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


def side_by_side(tables: Sequence[Table], configurations: Sequence[Configuration], budget: int = BUDGET) -> dict[str, Any]:
    """Return the answers of all configurations to items on which two of them differ, for a view that compares any two.

    Items whose scores differ come before those whose texts alone differ; all tasks take turns, until the budget is spent.

    Args:
        tables: Tables of all tasks.
        configurations: The configurations; of those with equal weights, only the first one is kept.
        budget: Largest number of characters of JSON.

    Returns:
        `items` (the questions), `answers` (name -> [score, text, log-likelihoods] of each item, null where it was not asked), `differing`
        (number of such items) and `left_out` (how many of them are not among the items).
    """
    shown = list({c.digest: c for c in reversed(configurations)}.values())[::-1]
    wanted = [[(t, i) for i in order] for t in tables if t.rows for order in _differing(t, [c.digest for c in shown])]
    scored, worded = wanted[0::2], wanted[1::2]
    items: list[dict[str, Any]] = []
    answers: dict[str, list[Any]] = {c.name: [] for c in shown}
    spent = 0
    for t, i in chain(_turns(scored), _turns(worded)):
        question = {key: t.items[i].get(key) for key in _QUESTION}
        row = [_short(t.rows[c.digest][i], t.metric) if c.digest in t.rows else None for c in shown]
        spent += len(json.dumps([question, row], ensure_ascii=False))
        if spent > budget:
            break
        items.append(question)
        for name, answer in zip(answers, row, strict=True):
            answers[name].append(answer)
    differing = sum(map(len, wanted))
    return {"items": items, "answers": answers, "differing": differing, "left_out": differing - len(items)}


def _answered(table: Table, digests: set[str]) -> bool:
    """Return True if a table holds answers of all these configurations; contrasts hold none."""
    return digests <= table.rows.keys()


def _items(table: Table, first: str, second: str) -> Iterator[dict[str, Any]]:
    for i, item in enumerate(table.items):
        before, after = table.rows[first][i], table.rows[second][i]
        way = change(table, float(table.values[first][i]), float(table.values[second][i]))
        answers = [_answer(row, item, table.metric) for row in (before, after)]
        yield {
            **{key: item.get(key) for key in _QUESTION},
            "metric": table.metric,
            "change": way,
            "differs": way != SAME or any(answers[0][key] != answers[1][key] for key in ("response", "picked")),
            "first": answers[0],
            "second": answers[1],
        }


def _answer(row: Row, item: Row, metric: str) -> dict[str, Any]:
    return {
        "score": row["metrics"].get(metric),
        "response": row.get("response"),
        "picked": picked(row, item, metric),
        "loglikelihoods": row.get("loglikelihoods"),
    }


def _short(row: Row, metric: str) -> list[Any]:
    """Return [score, text, log-likelihoods] with rounded numbers."""
    logs = row.get("loglikelihoods")
    short = None if logs is None else [round(float(x), 4) if is_number(x) else None for x in logs]
    return [row["metrics"].get(metric), row.get("response"), short]


def _differing(table: Table, digests: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the items whose scores differ between two configurations, and those of which only the texts do."""
    own = [d for d in digests if d in table.rows]
    if len(own) < 2:
        return [], []
    values = np.stack([table.values[d] for d in own])
    scored = (values != values[0]).any(axis=0)
    worded = [i for i in np.flatnonzero(~scored).tolist() if len({_text(table.rows[d][i]) for d in own}) > 1]
    return np.flatnonzero(scored).tolist(), worded


def _text(row: Row) -> str | None:
    text = row.get("response")
    return None if text is None else str(text)


def _turns(parts: Sequence[Sequence[tuple[Table, int]]]) -> Iterator[tuple[Table, int]]:
    """Yield one item of each task in turn."""
    for turn in zip_longest(*parts):
        yield from (one for one in turn if one is not None)


def counted(items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many items were won, lost and scored the same."""
    return {way: sum(item["change"] == way for item in items) for way in (WON, LOST, SAME)}
