"""Stored scores of corpus metrics, metrics where lower is better, choices and right or wrong answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workbench.scores.plan import Item, ScorePlan
from workbench.scores.store import Configuration, Scores, ScoreStore, TaskScores
from workbench.scores.suite import Suite

MISSING = "missing"
BASE = Configuration("0" * 32, "base", "base")
A = Configuration("1" * 32, "a", "configuration")
B = Configuration("2" * 32, "b", "configuration")
N = 240
# task -> kind, metrics, lower, ratios
TASKS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    "text": (
        "loglikelihood_rolling",
        ("word_perplexity", "bits_per_byte"),
        ("word_perplexity", "bits_per_byte"),
        {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"},
    ),
    "told": ("generate_until", ("error",), ("error",), {}),
    "stripped": ("generate_until", ("error",), ("error",), {}),
    "pick": ("multiple_choice", ("acc",), (), {}),
    "facts": ("generate_until", ("em",), (), {}),
}
SUITE = Suite(
    suite="toy",
    tasks=tuple(TASKS),
    chance={"pick": 0.25, "facts": 0.5},
    roles={"facts": "retention"},
    drawn={"facts": "items"},
    contrasts={"prior_gain": {"of": "stripped", "minus": "told"}},  # type: ignore[dict-item]
    min_effect={"text": 0.5},
)
Data = dict[
    str, list[Any]
]  # task -> of every item its score, (numerator, weight), or log-likelihoods of choices; gold is the first


def stored(
    store: ScoreStore, values: Mapping[Configuration, Data], suite: Suite = SUITE, clusters: int = 30, n: int = N, common: int = 0
) -> list[Scores]:
    """Write what an evaluation would: rows with the metrics of each kind of task. Of the facts, `common` have the other tasks' ids."""
    ids = {t: [f"facts-{i}" if t == "facts" and i >= common else str(i) for i in range(n)] for t in suite.tasks}
    plan = ScorePlan(
        suite=suite,
        facts=["p" * 32],
        items={t: tuple(Item(i, f"c{j % clusters}") for j, i in enumerate(ids[t])) for t in suite.tasks},
        kinds={t: TASKS[t][0] for t in suite.tasks},
        metrics={t: TASKS[t][1] for t in suite.tasks},
        lower={t: TASKS[t][2] for t in suite.tasks},
        ratios={t: TASKS[t][3] for t in suite.tasks},
        tokenizer=None,
        tokenizer_digest="",
        tasks_dir=Path(),
        dtype="float32",
        batch_size=1,
    )
    choices = {t: ["yes", "no", "maybe"] if TASKS[t][0] == "multiple_choice" else None for t in suite.tasks}
    items = {
        t: [{"task": t, "id": i.id, "cluster": i.cluster, "prompt": "?", "choices": choices[t], "gold": 0} for i in plan.items[t]]
        for t in suite.tasks
    }
    found = []
    for configuration, data in values.items():
        rows = {t: [_row(t, i.id, v) for i, v in zip(plan.items[t], data[t], strict=True)] for t in suite.tasks}
        scores = Scores(
            suite=suite.suite,
            plan=plan.digest,
            configuration=configuration,
            seconds=1.0,
            device="cpu",
            created="now",
            versions={},
            tasks={t: TaskScores(n=n, metrics={}) for t in suite.tasks},
        )
        found.append(store.write(plan, scores, rows, items))
    return found


def _row(task: str, name: str, value: Any) -> dict[str, Any]:
    kind, metrics, _, _ = TASKS[task]
    if kind == "multiple_choice":
        return {
            "task": task,
            "id": name,
            "metrics": {"acc": float(np.argmax(value) == 0)},
            "response": None,
            "loglikelihoods": value,
        }
    return {
        "task": task,
        "id": name,
        "metrics": {} if value == MISSING else dict.fromkeys(metrics, value),
        "response": "x",
        "loglikelihoods": None,
    }


def data(
    seed: int = 0, loss: float = 1.0, error: float = 0.4, stripped: float = 0.6, lead: float = 0.1, facts: float = 0.9
) -> Data:
    """Scores of one configuration: the same texts and difficulties for every seed, noise of its own."""
    shared, own = np.random.default_rng(7), np.random.default_rng(seed)
    words = shared.integers(20, 200, N)
    hard = shared.random((3, N))
    rate = loss * (1 + 0.2 * hard[0] + 0.05 * own.random(N))
    choices = np.stack([lead + hard[1] - 0.5 + 0.02 * own.normal(size=N), np.zeros(N), np.full(N, -3.0)], axis=1) - 4
    return {
        "text": [(-float(r * w), int(w)) for r, w in zip(rate, words, strict=True)],
        "told": np.clip(error + 0.2 * hard[2] + 0.05 * own.random(N), 0, 1).tolist(),
        "stripped": np.clip(stripped + 0.2 * hard[2] + 0.05 * own.random(N), 0, 1).tolist(),
        "pick": choices.tolist(),
        "facts": (hard[0] < facts).astype(float).tolist(),
    }
