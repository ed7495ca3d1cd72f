"""Scores of a toy suite of three tasks in a store, as an evaluation writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.evaluate import summarise
from workbench.ground.files import bytes_digest
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.store import Configuration, Scores, ScoreStore
from workbench.scores.suite import SCORERS, Suite

BASE = Configuration("0" * 32, "base", "base")
ADD = Configuration("1" * 32, "add", "brick", base=BASE.digest)
SORT = Configuration("2" * 32, "sort", "brick", base=BASE.digest)
AVERAGE = Configuration("3" * 32, "average", "average", ("add", "sort"))
MERGE = Configuration("4" * 32, "merge", "configuration", ("add", "sort"), "recipes/merge.yaml")
SUITE = Suite(
    suite="toy",
    tasks=("add", "sort", "facts"),
    primary={"add": "em", "sort": "em", "facts": "acc"},
    chance={"facts": 0.5},
    owners={"add": "add", "sort": "sort"},
    roles={"facts": "retention"},
    drawn={"facts": "items"},
)
# Share of items right, by configuration: add, sort, facts
SHARES = {BASE: (0.0, 0.1, 0.8), ADD: (1.0, 0.1, 0.8), SORT: (0.0, 0.9, 0.6), AVERAGE: (0.4, 0.5, 0.8), MERGE: (0.75, 0.45, 0.8)}


def digest_of_plan(fact: str) -> str:
    """Digest of a plan of `stored`."""
    return bytes_digest(json.dumps([fact, SCORERS["hflm"]]).encode())


def stored(
    store: ScoreStore,
    values: Mapping[Configuration, Sequence[Sequence[float]]],
    *,
    suite: Suite = SUITE,
    clusters: int | Sequence[int] = 30,
    plan: str = "p" * 32,
    partial: bool = False,
    routed: Mapping[str, Mapping[str, Sequence[list[str]]]] | None = None,
) -> list[Scores]:
    """Write scores as `evaluate` would: `values[configuration]` = the items' scores, task by task; clusters of equal size, or one an item.

    `routed[configuration][task]` says for each item which bricks answered.
    """
    n = len(next(iter(values.values()))[0])
    label = [i % clusters for i in range(n)] if isinstance(clusters, int) else clusters
    items = {t: tuple(Item(f"{t}-{i}", f"t{label[i]}") for i in range(n)) for t in suite.tasks}
    made = ScorePlan(
        suite=suite,
        facts=[plan],
        items=items,
        kinds=dict.fromkeys(suite.tasks, "generate_until"),
        metrics={t: (suite.primary[t],) for t in suite.tasks},
        tokenizer=None,
        tokenizer_digest="",
        tasks_dir=Path(),
        dtype="float32",
        batch_size=1,
        partial=partial,
    )
    asked = {
        t: [{"task": t, "id": i.id, "cluster": i.cluster, "prompt": f"{i.id}?", "choices": None, "gold": "1"} for i in items[t]]
        for t in suite.tasks
    }
    found = []
    for configuration, lines in values.items():
        rows = {
            t: [
                {"task": t, "id": i.id, "metrics": {suite.primary[t]: float(v)}, "response": str(v), "loglikelihoods": None}
                for i, v in zip(items[t], line, strict=True)
            ]
            for t, line in zip(suite.tasks, lines, strict=True)
        }
        for t, answered in ((routed or {}).get(configuration.name) or {}).items():
            rows[t] = [{**row, "routed": labels} for row, labels in zip(rows[t], answered, strict=True)]
        results = {
            t: {"rows": rows[t], "seconds": 1.0, "device": "cpu", "scorer": "generate", "tokens": None} for t in suite.tasks
        }
        scores = summarise(made, configuration, results)
        found.append(store.write(made, scores, rows, asked))
    return found
