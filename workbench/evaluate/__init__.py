"""Scoring through lm-eval's Python API, in memory, item by item. The only module that imports lm_eval, and only when it scores.

Settings that keep scores exact (see docs of lm-eval 0.4.13): no cache of any kind; `logits_cache` off, because it gathers wrong rows
when choices share a prefix with different splits; weights are never re-tied; log-softmax in float32 whatever the model's dtype;
a fixed batch size; fixed seeds. Equal to `lm_eval --model hf --model_args logits_cache=False,softmax_dtype=float32`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import WorkbenchError, nearest
from workbench.scores import Configuration, Metric, Row, Rows, Scores, Store, TaskScores
from workbench.statistics import codes, score_interval
from workbench.suites import SCORED_BY, Item, Plan, Suite, item_ids, make_plan
from workbench.taskfiles import Source, TaskFile, digest_of, files_digest, metric_name, task_index
from workbench.versions import installed

Progress = Callable[[str, int, int], None]  # task, tasks done, tasks in all
_SEED = 1234
_tasks: dict[str, dict[str, Any]] = {}  # lm-eval's tasks of the plan in use, by plan digest


def build_plan(
    suite: Suite, tokenizer: Any, *, tasks_dir: Path, dtype: str = "bfloat16", batch_size: int = 32, limit: int | None = None
) -> Plan:
    """Check a suite against its tasks and data, and fix its items. No model is loaded, and no lm_eval where data are JSON lines.

    Args:
        tokenizer: Folder of the tokenizer files, or a tokenizer object (copied before use).
        dtype: Of the weights when they are scored: "bfloat16".
        limit: At most so many items a task; marks the plan partial if that cuts something.
    Errors: unknown task, missing or empty data, duplicate ids, no cluster field, unknown metric.
    """
    index = task_index(tasks_dir)
    sources = [_source(name, suite, index, tasks_dir) for name in suite.tasks]
    return make_plan(suite, sources, tokenizer, tasks_dir=tasks_dir, dtype=dtype, batch_size=batch_size, limit=limit)


def evaluate(
    plan: Plan,
    store: Store,
    configuration: Configuration,
    materialize: Callable[[], Any],
    *,
    device: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Scores of a configuration: stored ones if its digest has any under this plan, else scored and stored.

    `materialize` gives the live model, already in the plan's dtype; it is called at most once, and only if a task is left to score.
    """
    store.write_plan(plan)
    if store.has(plan, configuration.digest):
        stored = store.read(plan, configuration.digest)
        if configuration.name not in stored.names:
            stored = stored.also(configuration)
            store.update(plan, stored)
        return stored.called(configuration)
    done = {task: result for task in plan.suite.tasks if (result := store.finished_task(plan, configuration.digest, task))}
    scorer = Scorer(plan, configuration, materialize(), device) if len(done) < len(plan.suite.tasks) else None
    for number, task in enumerate(plan.suite.tasks):
        if scorer and task not in done:
            if progress:
                progress(task, number, len(plan.suite.tasks))
            done[task] = scorer.task(task)
            store.keep_task(plan, configuration.digest, task, done[task])
    if progress:
        progress("", len(plan.suite.tasks), len(plan.suite.tasks))
    scores = summarise(plan, configuration, done)
    store.write(plan, scores, {t: done[t]["rows"] for t in plan.suite.tasks}, {t: done[t]["items"] for t in plan.suite.tasks})
    return scores


def score(
    plan: Plan, configuration: Configuration, model: Any, *, device: str | None = None, progress: Progress | None = None
) -> tuple[Scores, Rows]:
    """Score a live model without a store -> scores and per-item rows by task."""
    scorer, done = Scorer(plan, configuration, model, device), {}
    for number, task in enumerate(plan.suite.tasks):
        if progress:
            progress(task, number, len(plan.suite.tasks))
        done[task] = scorer.task(task)
    return summarise(plan, configuration, done), {t: result["rows"] for t, result in done.items()}


def summarise(plan: Plan, configuration: Configuration, results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Means and intervals over the rows of all tasks."""
    tasks = {}
    for task in plan.suite.tasks:
        rows = results[task]["rows"]
        cluster = codes([item.cluster for item in plan.items[task]])
        metrics = {}
        for metric in plan.metrics[task]:
            values = np.array([row["metrics"][metric] for row in rows])
            low, high = score_interval(values, cluster)
            metrics[metric] = Metric(value=float(values.mean()), low=low, high=high)
        tasks[task] = TaskScores(n=len(rows), metrics=metrics)
    return Scores(
        suite=plan.suite.suite,
        plan=plan.digest,
        configuration=configuration,
        partial=plan.partial,
        seconds=round(sum(results[t]["seconds"] for t in plan.suite.tasks), 2),
        device=results[plan.suite.tasks[0]]["device"],
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=installed(*SCORED_BY),
        tasks=tasks,
    )


class Scorer:
    """Scores a live model task by task. The model's weights, mode and the caller's tokenizer and random state stay as they were."""

    def __init__(self, plan: Plan, configuration: Configuration, model: Any, device: str | None = None) -> None:
        found = str(model.dtype).removeprefix("torch.")
        if found != plan.dtype:
            raise WorkbenchError(
                f"configuration '{configuration.name}' is in {found}, the plan scores {plan.dtype}",
                "Cast the model to the output dtype before scoring.",
            )
        self.plan, self.configuration = plan, configuration
        if device:
            model.to(device)
        self.model, training = model, model.training
        with quiet():
            self.tasks = _load_tasks(plan)
            self.lm = _safe_hflm()(
                model,
                tokenizer=_tokenizer(plan.tokenizer),
                batch_size=plan.batch_size,
                logits_cache=False,
                softmax_dtype="float32",
            )
        model.train(training)

    def task(self, name: str) -> dict[str, Any]:
        """Score one task -> {rows, items, seconds, device}. Errors: NaN or infinite log-likelihoods, NaN logits."""
        import lm_eval

        task, plan = self.tasks[name], self.plan
        ids = item_ids(task.eval_docs, name, bundled=name in plan.bundled)
        wanted = {item.id: item for item in plan.items[name]}
        samples = [i for i, identity in enumerate(ids) if identity in wanted]  # sorted: lm-eval mislabels unsorted ones
        if [ids[i] for i in samples] != list(wanted):
            raise WorkbenchError(
                f"task '{name}': lm-eval loads other items than the plan has", "The task's data changed: start again."
            )
        start, training = time.perf_counter(), self.model.training
        try:
            self.model.eval()
            task.set_fewshot_seed(seed=_SEED)  # again for each configuration: the sampler is one running stream
            with quiet(), _seeded(), _contiguous_head(self.model):
                result = lm_eval.evaluate(
                    self.lm,
                    {"tasks": {name: task}},
                    samples={name: samples},
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=plan.suite.chat_template,
                    fewshot_as_multiturn=plan.suite.chat_template,
                )
        except FloatingPointError:
            raise self._not_finite(name, "NaN logits while generating") from None
        finally:
            self.model.train(training)
        rows: dict[str, Row] = {}
        items: dict[str, Row] = {}
        filters = list(dict.fromkeys(sample["filter"] for sample in result["samples"][name]))
        for sample in result["samples"][name]:
            item = wanted[ids[sample["doc_id"]]]
            if item.id not in rows:
                items[item.id], rows[item.id] = self._rows(task, name, item, sample)
            for metric in sample["metrics"]:
                full = metric_name(metric, sample["filter"], filters)
                if full in plan.metrics[name]:
                    rows[item.id]["metrics"][full] = float(sample[metric])
        return {
            "rows": list(rows.values()),
            "items": list(items.values()),
            "device": self.model.device.type,
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _rows(self, task: Any, name: str, item: Item, sample: Mapping[str, Any]) -> tuple[Row, Row]:
        """What is asked (kept once a plan) and what was answered (without metrics yet)."""
        kind = self.plan.kinds[name]
        choices = list(task.doc_to_choice(sample["doc"])) if kind == "multiple_choice" else None
        gold = sample["target"]
        if choices and isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        asked = {
            "task": name,
            "id": item.id,
            "cluster": item.cluster,
            "prompt": str(sample["arguments"][0][0]),
            "choices": choices,
            "gold": gold if isinstance(gold, (int, str)) else str(gold),
        }
        answer: Row = {"task": name, "id": item.id, "metrics": {}, "response": None, "loglikelihoods": None}
        if kind == "generate_until":
            answer["response"] = str(sample["resps"][0][0])
        else:
            values = [float(np.ravel(response[0])[0]) for response in sample["resps"]]
            answer["loglikelihoods"] = values[: len(choices)] if choices else values
            if not all(map(math.isfinite, values)):
                raise self._not_finite(name, f"item '{item.id}' has log-likelihoods {values}")
        return asked, answer

    def _not_finite(self, task: str, found: str) -> WorkbenchError:
        return WorkbenchError(
            f"configuration '{self.configuration.name}', task '{task}': {found}",
            "The weights hold NaN or overflow: look for an over-scaled lambda or a broken brick.",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval, transformers, datasets and their progress bars, and put everything back."""
    import tqdm
    import transformers
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bar, start = tqdm.tqdm, tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:  # lm-eval passes disable= itself, so a default does not reach it
        start(self, *args, **{**kwargs, "disable": True})

    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level, verbosity = logger.level, transformers.logging.get_verbosity()
    bar.__init__ = silent
    disable_progress_bar()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bar.__init__ = start
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bar()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's default seeds for one task, so that a resumed evaluation draws the same; the caller's random state is kept."""
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(_SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Hand the output head contiguous rows: `generate` gives it a strided slice of the prompt's last positions, for which torch's
    CPU matrix product copies the whole head once a row (3.4 s instead of 0.85 s for 16 prompts of 10 tokens, 49,152 words, bf16)."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),)) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _tokenizer(tokenizer: Any) -> Any:
    """An own tokenizer: lm-eval sets a pad token on the one it gets."""
    if not isinstance(tokenizer, (str, Path)):
        return copy.deepcopy(tokenizer)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)


@cache
def _safe_hflm() -> type:
    from lm_eval.models.huggingface import HFLM
    from transformers import LogitsProcessorList

    def refuse_nan(_ids: Any, logits: Any) -> Any:
        if logits.isnan().any():
            raise FloatingPointError
        return logits

    class SafeHFLM(HFLM):  # type: ignore[misc]
        """HFLM that leaves the weights it is handed alone: an untied output head is not tied again."""

        def __init__(self, pretrained: Any, **kwargs: Any) -> None:
            pretrained.tie_weights = lambda *_args, **_kwargs: None
            try:
                super().__init__(pretrained=pretrained, **kwargs)
            finally:
                del pretrained.tie_weights

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            return super()._model_generate(*args, **kwargs, logits_processor=LogitsProcessorList([refuse_nan]))

    return SafeHFLM


def _source(name: str, suite: Suite, index: Mapping[str, TaskFile], tasks_dir: Path) -> Source:
    """A task's documents: read directly where possible, else loaded by lm-eval (custom code, hub data, bundled tasks)."""
    found = index.get(name)
    source = found.source(name) if found else None
    if source is not None:
        return source
    from lm_eval.api.metrics import mean

    with quiet():
        task = _task(_manager(tasks_dir, bundled=found is None), name, index)
        docs = [dict(doc) for doc in task.eval_docs]
        shots = list(task.fewshot_docs() or ()) if suite.num_fewshot or task.config.num_fewshot else []
    filters = [f.name for f in task._filters]
    means = [m for m, how in task.aggregation().items() if how is mean]
    lower = {m for m in means if not task.higher_is_better().get(m, True)}
    parts = [files_digest(found.files, found.path.parent) if found else name, docs, shots]
    return Source(
        name,
        str(task.OUTPUT_TYPE),
        tuple(metric_name(m, f, filters) for f in filters for m in means),
        frozenset(metric_name(m, f, filters) for f in filters for m in lower),
        docs,
        digest_of(repr(parts).encode()),
        bundled=found is None,
    )


def _manager(tasks_dir: Path, *, bundled: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_dir), include_defaults=bundled)  # with defaults: 14,000 files, 4 s


def _task(manager: Any, name: str, known: Sequence[str] | Mapping[str, Any]) -> Any:
    """Load one task. Errors: unknown name, a group, data out of reach."""
    if name not in manager.all_tasks:
        close = nearest(name, known)
        raise WorkbenchError(
            f"unknown task '{name}'", close if close.startswith("Did") else nearest(name, manager.all_subtasks)[:300]
        )
    if name not in manager.all_subtasks:
        raise WorkbenchError(f"'{name}' is a group of tasks", "List its tasks in the suite, each with its own primary metric.")
    try:
        loaded = manager.load([name])["tasks"]
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") or os.environ.get("HF_DATASETS_OFFLINE") == "1"
        hint = (
            "The hub is switched off: unset HF_HUB_OFFLINE, or use a local task."
            if offline
            else "Check the task's data and code."
        )
        raise WorkbenchError(f"task '{name}' could not be loaded: {type(error).__name__}: {str(error)[:300]}", hint) from error
    return loaded[name]


def _load_tasks(plan: Plan) -> dict[str, Any]:
    """lm-eval's task objects of a plan, with the settings that lm-eval's own front end would make; kept for the next configuration."""
    if plan.digest not in _tasks:
        managers = {
            bundled: _manager(plan.tasks_dir, bundled=bundled) for bundled in {t in plan.bundled for t in plan.suite.tasks}
        }
        tasks = {name: _task(managers[name in plan.bundled], name, plan.suite.tasks) for name in plan.suite.tasks}
        for task in tasks.values():
            own, asked = task.get_config("num_fewshot"), plan.suite.num_fewshot
            if own == 0 and asked:  # lm-eval would go on without examples
                raise WorkbenchError(
                    f"task '{task.task_name}' fixes num_fewshot: 0, the suite asks for {asked}",
                    "Leave num_fewshot out of the task's YAML, or out of the suite.",
                )
            task.set_config(key="num_fewshot", value=own or 0 if asked is None else asked)
        _tasks.clear()
        _tasks[plan.digest] = tasks
    return _tasks[plan.digest]
