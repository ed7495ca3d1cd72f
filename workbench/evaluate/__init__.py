"""Scoring through lm-eval, item by item. Only this package imports lm_eval, and only to build tasks and to score.

lm-eval defines tasks, prompts, filters and metrics. Requests are built and tokenized once per plan. Log-likelihoods come from
`packed` (each context is forwarded once), and greedy texts from `greedy`, both checked against lm-eval's HFLM. Other text comes from
HFLM, or from lm-eval's classes for vLLM and servers. These settings keep scores exact (see the docs of lm-eval 0.4.13): no caches; `logits_cache` is off,
because it gathers wrong rows if choices share a prefix with different splits; weights are never tied again; log-softmax in
float32 for every model dtype; fixed batches; fixed seeds. Scores equal those of `lm_eval --model hf --model_args
logits_cache=False,softmax_dtype=float32`.

Importing `workbench.evaluate.models` registers the model `workbench` with lm-eval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.evaluate.measured import quiet
from workbench.evaluate.tasks import groups_of, source_of
from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.events import Progress
from workbench.ground.identity import installed
from workbench.scores.documents import Measured
from workbench.scores.groups import expanded
from workbench.scores.plan import ScorePlan, SuiteTasks, make_plan
from workbench.scores.statistics import codes
from workbench.scores.store import Check, Configuration, Metric, Rows, Scores, ScoreStore, TaskResult, TaskScores
from workbench.scores.suite import SCORED_BY, Suite
from workbench.scores.tasks import task_index

__all__ = ["Progress", "build_plan", "evaluate", "quiet", "score", "summarise"]


def register() -> None:
    """Register the model `workbench` with lm-eval. Its class is imported when lm-eval first uses it."""
    import lm_eval.models  # noqa: F401  lm-eval registers its own models only while no model is registered
    from lm_eval.api.registry import model_registry

    if "workbench" not in model_registry:
        model_registry.register("workbench", target="workbench.evaluate.models:WorkbenchLM")


if "lm_eval" in sys.modules:  # `import lm_eval` before `import workbench.evaluate` is enough in scripts
    register()


def build_plan(
    suite: Suite,
    tokenizer: Any,
    *,
    tasks_dir: Path,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    limit: int | None = None,
    memo: Path | None = None,
) -> ScorePlan:
    """Check a suite against its tasks and data, and fix its items. No model is loaded.

    Args:
        suite: The suite.
        tokenizer: Folder of the tokenizer files, or a tokenizer object (copied before use).
        tasks_dir: Folder of local task files.
        dtype: Dtype of the weights when they are scored, such as "bfloat16".
        batch_size: Requests per forward pass.
        limit: Largest number of items per task; marks the plan as partial if it cuts a task.
        memo: Folder that caches the content of local tasks until a file that affects it changes; None: build the tasks in each
            call.

    Raises:
        WorkbenchError: If a task or metric is unknown, data is missing or empty, IDs repeat, or the cluster field is missing.
    """
    _check_generation(suite)
    index = task_index(tasks_dir)
    groups = groups_of(suite, index, tasks_dir)
    suite = expanded(suite, groups)
    sources = [source_of(name, suite, index, tasks_dir, memo) for name in suite.tasks]
    tasks = SuiteTasks(suite, sources, tasks_dir, [g for found in groups.values() for g in found])
    return make_plan(tasks, tokenizer, dtype=dtype, batch_size=batch_size, limit=limit)


def _check_generation(suite: Suite) -> None:
    """Raise WorkbenchError for a setting of generation that transformers does not have, before a model is loaded."""
    if not suite.gen_kwargs or suite.backend != "hf":
        return
    from transformers import GenerationConfig

    known = ["until", "max_gen_toks", *(name for name in vars(GenerationConfig()) if not name.startswith("_"))]
    for name in suite.gen_kwargs:
        if name not in known:
            raise WorkbenchError(f"suite '{suite.suite}': gen_kwargs: unknown setting '{name}'", nearest(name, known))


def evaluate(
    plan: ScorePlan,
    store: ScoreStore,
    configuration: Configuration,
    materialize: Callable[[], Any],
    *,
    device: str | None = None,
    progress: Progress | None = None,
    wait: float | None = None,
) -> Scores:
    """Return a configuration's scores under a plan: stored ones if there are any, else score it and store the result.

    One process at a time scores a configuration under a plan; those that wait for it then find its scores.

    Args:
        plan: The plan.
        store: Store of scores.
        configuration: The configuration to score.
        materialize: Returns the live model in the plan's dtype, or, for the backends vllm and server, the argument of
            `backends.written_model`. Called at most once, and only if a task is left to score.
        device: Device to move a live model to.
        progress: Called with (task, requests done, requests in total).
        wait: Seconds to wait for another process that scores the same; None: until it ends.

    Raises:
        BusyError: If another process still scores the same.
        check.RefusedError: If the plan's scorer disagrees with lm-eval; the store keeps the reason. Score all configurations that
        are compared with this one under `store.settled(plan, keys)`.
    """
    key = configuration.key(plan)
    store.write_plan(plan)
    if not (store.has(plan, key) and store.read(plan, key).knows(configuration)):
        with store.held(plan, key, configuration.name, wait):
            if not store.has(plan, key):
                return _scored(plan, store, configuration, materialize, device, progress)
            stored = store.read(plan, key)
            if not stored.knows(configuration):
                store.update(plan, stored.also(configuration))
    store.forget_parts(plan, key)  # which stay if a call is killed after it has stored its scores
    return store.read(plan, key).called(configuration)


def _scored(
    plan: ScorePlan,
    store: ScoreStore,
    configuration: Configuration,
    materialize: Callable[[], Any],
    device: str | None,
    progress: Progress | None,
) -> Scores:
    """Score a configuration under a plan from where an earlier call stopped, and store the result."""
    from workbench.evaluate.check import RefusedError

    key = configuration.key(plan)
    if plan.scorer != "hflm" and (reason := store.refused(plan, key)):
        raise RefusedError(reason.partition(": ")[2])
    done = {task: result for task in plan.suite.tasks if (result := store.finished_task(plan, key, task))}
    if len(done) < len(plan.suite.tasks):
        from workbench.evaluate.scorer import Scorer

        scorer = Scorer(plan, configuration, materialize(), device, [task for task in plan.suite.tasks if task not in done])
        try:
            check = scorer.check(store)
        except RefusedError as error:
            store.refuse(plan, key, f"{configuration.name}: {error}")
            raise
        store.begin(plan, key, configuration.name)
        for task in plan.suite.tasks:
            if task not in done:
                journal = store.journal(plan, key, task)
                shifted = _offset(progress, scorer.sizes(), [t for t in plan.suite.tasks if t in done])
                done[task] = {**scorer.task(task, journal, shifted), "check": check.model_dump() if check else None}
                store.keep_task(plan, key, task, done[task])
    if progress:
        progress("", 1, 1)
    scores = summarise(plan, configuration, done)
    return store.write(
        plan, scores, {t: done[t]["rows"] for t in plan.suite.tasks}, {t: done[t]["items"] for t in plan.suite.tasks}
    )


def _offset(progress: Progress | None, sizes: Mapping[str, int], done: Sequence[str]) -> Progress | None:
    """Return progress over all tasks; its last unit is writing the scores."""
    if progress is None:
        return None
    before, total = sum(sizes[task] for task in done), sum(sizes.values()) + 1
    return lambda task, count, _: progress(task, before + count, total)


def score(
    plan: ScorePlan, configuration: Configuration, model: Any, *, device: str | None = None, progress: Progress | None = None
) -> tuple[Scores, Rows]:
    """Score a live model without a store. If the plan's scorer fails its check, hflm is used.

    Args:
        plan: The plan.
        configuration: The configuration that the model holds.
        model: The live model in the plan's dtype.
        device: Device to move the model to.
        progress: Called with (task, requests done, requests in total).

    Returns:
        The scores, and rows per item by task.
    """
    from workbench.evaluate.check import RefusedError
    from workbench.evaluate.scorer import Scorer

    scorer = Scorer(plan, configuration, model, device)
    try:
        check = scorer.check()
    except RefusedError:
        return score(plan.by("hflm"), configuration, model, device=device, progress=progress)
    record = check.model_dump() if check else None
    done: dict[str, TaskResult] = {}
    for task in plan.suite.tasks:
        done[task] = {**scorer.task(task, progress=progress), "check": record}
    return summarise(plan, configuration, done), {task: result["rows"] for task, result in done.items()}


def summarise(plan: ScorePlan, configuration: Configuration, results: Mapping[str, TaskResult]) -> Scores:
    """Compute means, ratios and their intervals over the rows of all tasks."""
    tasks = {}
    for task in plan.suite.tasks:
        result = results[task]
        cluster = codes([item.cluster for item in plan.items[task]])
        kinds = plan.ratios.get(task, {})
        rows = [row["metrics"] for row in result["rows"]]
        names = [name for name in rows[0] if all(name in row for row in rows)]  # margins exist for some items only
        metrics = {name: Metric.of([row[name] for row in rows], cluster, kinds.get(name)) for name in names}
        tasks[task] = TaskScores(
            n=len(result["rows"]),
            metrics=metrics,
            seconds=result["seconds"],
            scorer=result["scorer"],
            tokens=result["tokens"],
            answers=result.get("answers"),  # results that an earlier version kept have none of these
            answer_tokens=result.get("answer_tokens"),
            measured=Measured.model_validate(result["measured"]) if result.get("measured") else None,
        )
    first = results[plan.suite.tasks[0]]
    checks = [Check.model_validate(check) for result in results.values() if (check := result.get("check"))]
    return Scores(
        suite=plan.suite.suite,
        plan=plan.digest,
        configuration=configuration,
        partial=plan.partial,
        seconds=round(sum(results[t]["seconds"] for t in plan.suite.tasks), 2),
        device=first["device"],
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=installed(*SCORED_BY),
        tasks=tasks,
        check=max(checks, key=lambda check: check.max_difference / check.tolerance) if checks else None,
        tokens=sum(results[t]["tokens"] or 0 for t in plan.suite.tasks),
    )
