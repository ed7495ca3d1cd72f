"""Every local task on the starter base: the numbers of lm-eval's own model on the same items."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worlds.places import STARTER, TASKS

from workbench.evaluate import build_plan, score
from workbench.evaluate.measured import quiet
from workbench.scores.plan import ScorePlan, item_ids
from workbench.scores.store import Configuration
from workbench.scores.suite import Suite
from workbench.scores.tasks import task_index

pytestmark = [pytest.mark.starter, pytest.mark.slow]

BASE = STARTER
BATCH = 32
NAMES = sorted(task_index(TASKS))


def theirs(plan: ScorePlan, model: Any, batch_size: int = BATCH) -> dict[str, Any]:
    """lm-eval's samples of the plan's items, by its own front end and model class."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    with quiet():
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        tasks = manager.load(list(plan.suite.tasks))["tasks"]
        wanted = {name: {item.id for item in plan.items[name]} for name in tasks}
        samples = {name: [i for i, found in enumerate(item_ids(task.eval_docs, name)) if found in wanted[name]] for name, task in tasks.items()}  # fmt: skip
        lm = HFLM(
            model,
            tokenizer=AutoTokenizer.from_pretrained(BASE),
            batch_size=batch_size,
            logits_cache=False,
            softmax_dtype="float32",
        )
        found = lm_eval.simple_evaluate(
            lm, tasks=list(tasks), samples=samples, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    return dict(found["samples"])


def plan_of(dtype: str, names: list[str], items: int) -> ScorePlan:
    return build_plan(Suite(suite="all", tasks=tuple(names), limit=items), BASE, tasks_dir=TASKS, dtype=dtype, batch_size=BATCH)


def model_in(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


def test_every_local_task_in_float32() -> None:
    model, plan = model_in(torch.float32), plan_of("float32", NAMES, 2)
    scores, rows = score(plan, Configuration("0" * 32, "base"), model)
    assert scores.plan == plan.digest
    assert scores.check is not None
    assert scores.check.max_difference <= 1e-4
    expected = theirs(plan, model)
    for name in NAMES:
        by_id = {s["doc"]["id"]: s for s in expected[name]}
        assert len(rows[name]) == 2
        for row in rows[name]:
            sample = by_id[row["id"]]
            if row["loglikelihoods"] is None:
                assert row["response"] == sample["resps"][0][0], (name, row["id"])
            else:
                assert row["loglikelihoods"] == pytest.approx([r[0][0] for r in sample["resps"]], abs=1e-4), (name, row["id"])
            for metric in sample["metrics"]:
                assert row["metrics"][metric] == pytest.approx(sample[metric], abs=1e-12), (name, row["id"])


def test_choices_in_bfloat16_within_twice_lm_evals_own_spread() -> None:
    names = ["add_mc", "facts", "glossary_mc", "retention"]
    model, plan = model_in(torch.bfloat16), plan_of("bfloat16", names, 5)
    scores, rows = score(plan, Configuration("0" * 32, "base"), model)
    assert scores.plan == plan.digest
    assert scores.check is not None
    assert scores.check.spread is not None
    one, many = theirs(plan, model, 1), theirs(plan, model)

    def values(samples: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
        return {(name, s["doc"]["id"]): [r[0][0] for r in s["resps"]] for name in names for s in samples[name]}

    alone, batched = values(one), values(many)
    ours = {(name, row["id"]): row["loglikelihoods"] for name in names for row in rows[name]}
    spread = max(abs(a - b) for key in batched for a, b in zip(alone[key], batched[key], strict=True))
    assert max(abs(a - b) for key in batched for a, b in zip(ours[key], batched[key], strict=True)) <= 2 * spread
