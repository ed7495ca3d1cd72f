"""Whole worlds through the command line: 12 configurations on 5 skill tasks of several kinds and a guarded one, compared from the store.

`WORKBENCH_TRIALS=250 make nightly ARGS="-k worlds"` tries 500.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.commands import run
from worlds.measured import measured
from worlds.simulated import MOST, MOST_ONE_SIDED, answers, one_way

from workbench.exchange.imports import ImportedPlan
from workbench.scores.plan import Item
from workbench.scores.store import Configuration, Scores, ScoreStore, TaskScores
from workbench.scores.suite import Suite

pytestmark = pytest.mark.nightly
TRIALS = int(os.environ.get("WORKBENCH_TRIALS", "8"))
NAMES = [f"c{i}" for i in range(1, 13)]
METRICS = {"f1s": "f1", "rouge": "rougeL", "answers": "acc", "chapters": "f1", "rare": "f1", "keep": "acc"}
TOLERANCE = 0.05


def world(rng: np.random.Generator, gain: float) -> dict[str, tuple[Any, Any]]:
    """Scores [1 + configurations, items] and clusters by task: no difference on average but `gain`; `keep` loses the tolerance."""
    k = len(NAMES)
    rare = np.where((draw := rng.random((k, 120))) < 0.03, 0.5, np.where(draw > 0.6, -0.0375 * rng.uniform(0, 2, (k, 120)), 0.0))
    small = 0.05 * rng.normal(size=(k, 100))
    by_three = np.arange(240) // 8
    gaining = (rng.random((k, 30)) < 0.1)[:, by_three]
    chapters = np.where(gaining, rng.uniform(0.2, 0.4, (k, 240)), -0.3 / 9 * rng.uniform(0, 2, (k, 240)))
    probable = 0.3 * (rng.beta(0.3, 3, (k, 150)) - 1 / 11)
    by_ten = np.arange(300) // 10
    found = {
        "f1s": (np.vstack([np.full(120, 0.4), 0.4 + rare + gain]), np.arange(120)),
        "rouge": (np.vstack([np.full(100, 0.4), 0.4 + small + gain]), np.arange(100)),
        "answers": (answers(rng, by_ten, k, gain=4 * gain, by_cluster=0.2), by_ten),
        "chapters": (np.vstack([np.full(240, 0.4), 0.4 + chapters + gain]), by_three),
        "rare": (np.vstack([np.full(150, 0.4), 0.4 + probable + gain]), np.arange(150)),
        "keep": (one_way(rng, np.arange(200), TOLERANCE, k), np.arange(200)),
    }
    return {task: (values.clip(0, 1), clusters) for task, (values, clusters) in found.items()}


def compared(folder: Path, scores: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Store a world as imported runs, and compare it by the command."""
    suite = Suite.model_validate(
        {"suite": "x", "tasks": tuple(scores), "primary": METRICS, "roles": {"keep": "guarded"}, "tolerance": TOLERANCE}
    )
    items = {task: tuple(Item(str(i), str(c)) for i, c in enumerate(clusters)) for task, (_, clusters) in scores.items()}
    plan = ImportedPlan(
        suite=suite, items=items, kinds=dict.fromkeys(scores, "generate_until"), metrics={t: (m,) for t, m in METRICS.items()},
        tokenizer=None, tokenizer_digest="", tasks_dir=Path(), dtype="", batch_size=0, lower={}, scorer="lm_eval",
        identities=dict.fromkeys(scores, "d" * 32),
    )  # fmt: skip
    store = ScoreStore(folder / "runs" / "scores")
    told = {
        t: [{"task": t, "id": i.id, "cluster": i.cluster, "prompt": "?", "choices": None, "gold": "1"} for i in items[t]]
        for t in scores
    }
    for number, name in enumerate(["base", *NAMES]):
        rows = {
            t: [{"task": t, "id": i.id, "metrics": {METRICS[t]: float(v)}, "response": "", "loglikelihoods": None} for i, v in zip(items[t], values[number], strict=True)]
            for t, (values, _) in scores.items()
        }  # fmt: skip
        made = Scores(
            suite="x", plan=plan.digest, configuration=Configuration(f"{number + 1:012x}{0:020x}", name), seconds=1.0, device="cpu",
            created="now", versions={}, tasks={t: TaskScores(n=len(r), metrics={}) for t, r in rows.items()},
        )  # fmt: skip
        store.write(plan, made, rows, told)
    called = run(
        "compare", "base", *NAMES, "--suite", "x", "--baseline", "base", "--runs-dir", str(folder / "runs"), "--json", code=(0, 3)
    )
    found: dict[str, Any] = json.loads(called.stdout)
    return found


def test_no_difference_and_harm_at_the_tolerance(tmp_path: Path) -> None:
    """Any false better or worse in a family of 60 rows; and any configuration shipped that is better and as harmful as the tolerance."""
    rng, found = np.random.default_rng(66), np.zeros(3)
    for trial in range(TRIALS):
        none, gain = (compared(tmp_path / f"{trial}-{size}", world(rng, size)) for size in (0.0, 0.06))
        found += (
            any(row["verdict"] in ("better", "worse") for row in none["rows"] if row["family"] == "compared"),
            gain["recommendation"]["configuration"] in NAMES,
            sum(row["verdict"] == "better" for row in gain["rows"]) / 60,
        )
    false, shipped, power = found / TRIALS
    error = (MOST * (1 - MOST) / TRIALS) ** 0.5
    measured("world, power", power, kind="gain of 6 points")
    assert measured("world, any false better or worse", false, kind="no difference") <= MOST + 2 * error
    assert measured("world, harmful shipped", shipped, kind="gain of 6 points") <= MOST_ONE_SIDED + 2 * error
