"""Scores in a store as an evaluation writes them, from numbers that a test gives: a world for tests of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.scores.plan import Item, ScorePlan
from workbench.scores.store import Configuration, Scores, ScoreStore, TaskScores
from workbench.scores.suite import Suite

BASE = Configuration("0" * 32, "base", "base")
ADD = Configuration("1" * 32, "add", "brick")
SORT = Configuration("2" * 32, "sort", "brick")
AVERAGE = Configuration("3" * 32, "average", "average", ("add", "sort"))
MEAN = Configuration("3" * 32, "my-average", "configuration", ("add", "sort"), "recipes/my-average.yaml")
ALONE = Configuration("1" * 32, "just-add", "configuration", ("add",), "recipes/just-add.yaml")
NOOP = Configuration("0" * 32, "noop", "configuration", ("add", "sort"), "recipes/noop.yaml")
TIES = Configuration("4" * 32, "ties", "configuration", ("add", "sort"), "recipes/ties.yaml")
TWIN = Configuration("4" * 32, "ties-again", "configuration", ("add", "sort"), "recipes/ties-again.yaml")
FOUR = ["a", "b", "c", "d"]
Row = Mapping[str, Any]
Values = Mapping[Configuration, Mapping[str, Sequence[float]]]


def stored(
    store: ScoreStore,
    values: Values,
    *,
    kind: str = "generate_until",
    metric: str = "em",
    clusters: int = 30,
    few: Mapping[str, int] | None = None,
    items: Sequence[Row] | None = None,
    lower: Sequence[str] = (),
    sizes: Sequence[int] | None = None,
    answers: Callable[[Configuration, str, int], Row] | None = None,
    **suite: Any,
) -> list[Scores]:
    """Write scores as an evaluation would.

    Args:
        values: Configuration -> task -> scores of its items.
        kind, metric, lower: Of every task.
        clusters: Number of clusters of every task.
        few: Number of clusters of tasks that have fewer.
        items: What each item says of its choices and gold answers.
        sizes: Items of each cluster, one after the other; without them items take turns.
        answers: What the row of a configuration's answer to an item of a task says besides its score.
        suite: Fields of the suite.
    """
    tasks = tuple(next(iter(values.values())))
    n = len(next(iter(values.values()))[tasks[0]])
    labels = np.repeat(np.arange(len(sizes)), sizes).tolist() if sizes else [i % clusters for i in range(n)]
    plan = ScorePlan(
        suite=Suite.model_validate({"suite": "toy", "tasks": tasks, "primary": dict.fromkeys(tasks, metric), **suite}),
        facts=["p" * 32],
        items={t: tuple(Item(f"{t}-{i}", f"c{labels[i] % (few or {}).get(t, n)}") for i in range(n)) for t in tasks},
        kinds=dict.fromkeys(tasks, kind),
        metrics=dict.fromkeys(tasks, (metric,)),
        lower=dict.fromkeys(tasks, tuple(lower)),
        tokenizer=None,
        tokenizer_digest="",
        tasks_dir=Path(),
        dtype="float32",
        batch_size=1,
    )
    told = items or [{"choices": None, "gold": "1"}] * n
    asked = {
        t: [{"task": t, "id": i.id, "cluster": i.cluster, "prompt": "?", **told[j]} for j, i in enumerate(plan.items[t])]
        for t in tasks
    }
    found = []
    for c, lines in values.items():
        rows = {
            t: [
                {"task": t, "id": i.id, "metrics": {metric: float(v)}, "response": str(v), "loglikelihoods": None}
                | (answers(c, t, j) if answers else {})
                for j, (i, v) in enumerate(zip(plan.items[t], lines[t], strict=True))
            ]
            for t in tasks
        }
        scores = Scores(
            suite=plan.suite.suite,
            plan=plan.digest,
            configuration=c,
            seconds=1.0,
            device="cpu",
            created="now",
            versions={},
            tasks={t: TaskScores(n=n, metrics={}) for t in tasks},
        )
        found.append(store.write(plan, scores, rows, asked))
    return found


def right(share: float, n: int = 240, seed: int = 0) -> list[float]:
    """Items right at random places, nested for equal seeds: a better configuration has the worse one's right too."""
    return (np.random.default_rng(seed).permutation(n) < round(share * n)).astype(float).tolist()


def of(document: Row, name: str) -> Any:
    return next(c for c in document["configurations"] if c["name"] == name)
