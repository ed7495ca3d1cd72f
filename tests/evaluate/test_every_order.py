"""Scores against `lm_eval.simple_evaluate`, item by item: every kind of request and metric, fourteen architectures, and any order of tasks, items
and configurations in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worlds.local_tasks import A, suite
from worlds.request_kinds import FAMILIES, MORE_TASKS, STATEFUL, TASKS, items, model_of, write_tasks

from workbench.evaluate import build_plan, score
from workbench.evaluate.measured import quiet
from workbench.evaluate.models import WorkbenchLM

EVERY = {**TASKS, **MORE_TASKS}
ITEMS = items()
API = "lm-eval's API"
Samples = Mapping[tuple[str, str], Mapping[str, Any]]
"""(task, item) -> lm-eval's sample."""


class World:
    """The saved models, and what lm-eval's own model class gives for each, asked once."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self._number = folder, tokenizer, count()
        self.theirs: Callable[[str], tuple[Samples, Any]] = cache(self._theirs)

    def tasks(self, order: Sequence[int]) -> Path:
        """A new folder of all tasks with the items in an order."""
        return write_tasks(self.folder / str(next(self._number)), [ITEMS[i] for i in order], EVERY)

    def _theirs(self, family: str) -> tuple[Samples, Any]:
        """lm-eval's samples and its results by task, for the written model with the items in their own order."""
        from lm_eval.models.huggingface import HFLM

        place = str(self.folder / family)
        model_of(family).save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        batch = 1 if family == "recurrent_gemma" else 4  # its state takes up the padding of lm-eval's batches, and ours have none
        with quiet():
            lm = HFLM(
                pretrained=place, device="cpu", dtype="float32", batch_size=batch, logits_cache=False, softmax_dtype="float32"
            )
        return self.evaluated(lm, list(EVERY), range(len(ITEMS)))

    def evaluated(self, lm: Any, names: Sequence[str], order: Sequence[int]) -> tuple[Samples, Any]:
        """What `simple_evaluate` gives for a model on the tasks and items in an order."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        with quiet():
            manager = TaskManager(include_path=str(self.tasks(order)), include_defaults=False)
            found = simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True)
        return {(task, s["doc"]["id"]): s for task in names for s in found["samples"][task]}, found["results"]


@pytest.fixture(scope="module")
def world(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("orders"), tokenizer)


def responses(sample: Mapping[str, Any]) -> list[Any]:
    return [r[0] if isinstance(r[0], (str, float)) else r[0][0] for r in sample["resps"]]


def check_same(found: Any, expected: Any, where: object) -> None:
    """Check that texts are equal, and log-likelihoods and what is made of them close."""
    texts = isinstance(expected, list) and isinstance(expected[0], str)
    assert found == (expected if texts else pytest.approx(expected, abs=1e-4, rel=1e-5)), where


def check_ours(world: World, family: str, scorer: str, line: tuple[Sequence[str], Sequence[int], int]) -> None:
    """Score one configuration and compare all answers, metrics of items, and metrics of tasks."""
    names, order, batch = line
    samples, results = world.theirs(family)
    chosen = suite(tasks=names, chance={}, scorer=scorer)
    plan = build_plan(chosen, world.tokenizer, tasks_dir=world.tasks(order), dtype="float32", batch_size=batch)
    scores, rows = score(plan, A, model_of(family))
    assert (scores.plan == plan.by("hflm").digest) == (family in STATEFUL or scorer == "hflm"), "the scorer was refused"
    for task in names:
        assert [row["id"] for row in rows[task]] == [ITEMS[i]["id"] for i in order]
        for row in rows[task]:
            where, sample = (family, task, row["id"]), samples[task, row["id"]]
            answers = [row["response"]] if row["loglikelihoods"] is None else row["loglikelihoods"]
            check_same(answers, responses(sample)[: len(answers)], where)
            assert len(answers) == len(sample["resps"]) or task == "every"  # answers without a context are not kept
            for metric in (m for m in sample["metrics"] if isinstance(sample[m], (int, float))):
                value = row["metrics"][metric]
                check_same(value[0] if isinstance(value, list) else value, sample[metric], (*where, metric))
        theirs = {key.partition(",")[0]: v for key, v in results[task].items() if "," in key and "_stderr," not in key}
        check_same({metric: scores.tasks[task].metrics[metric].value for metric in theirs}, theirs, (family, task))
    assert {task: scores.tasks[task].n for task in names} == dict.fromkeys(names, len(ITEMS))


def check_api(world: World, family: str, line: tuple[Sequence[str], Sequence[int], int]) -> None:
    """The same through lm-eval's front end with our model class; lm-eval sizes the batches, except those of models without a longest text."""
    names, order, _ = line
    samples, results = world.theirs(family)
    batches = {"batch_size": 3} if family in STATEFUL else {"batch_size": "auto", "max_batch_size": 4}
    with quiet():
        lm = WorkbenchLM(model_of(family), tokenizer=world.tokenizer, **batches)
    found, in_all = world.evaluated(lm, names, order)
    for key, sample in found.items():
        check_same(responses(sample), responses(samples[key]), (family, *key))
    for task in names:
        numbers = [{k: v for k, v in r[task].items() if isinstance(v, (int, float))} for r in (in_all, results)]
        check_same(*numbers, (family, task))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_request_type_equals_lm_eval(family: str, world: World) -> None:
    check_ours(world, family, "packed", (list(EVERY), range(len(ITEMS)), 4))


@given(
    st.tuples(
        st.permutations(list(EVERY)).map(lambda names: names[:4]), st.permutations(range(len(ITEMS))), st.sampled_from([1, 3, 32])
    ),
    st.lists(st.tuples(st.sampled_from([*FAMILIES]), st.sampled_from(["packed", "prefix", "hflm", API])), min_size=2, max_size=3),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_no_order_changes_a_score(world: World, line: tuple[list[str], list[int], int], lineup: list[tuple[str, str]]) -> None:
    """Configurations one after another under one plan; what each leaves in caches is what the next finds there."""
    for family, scorer in lineup:
        if scorer == API:
            check_api(world, family, line)
        else:
            check_ours(world, family, scorer, line)
