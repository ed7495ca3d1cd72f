"""lm-eval's task objects: local files or bundled ones, with the settings that lm-eval's own front end would make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from workbench.errors import WorkbenchError, nearest, shell
from workbench.evaluate.quiet import quiet
from workbench.suites import Plan, Suite
from workbench.taskfiles import Source, TaskFile, digest_of, files_digest, metric_name


def source_of(name: str, suite: Suite, index: Mapping[str, TaskFile], tasks_dir: Path) -> Source:
    """A task's documents: read directly where possible, else loaded by lm-eval (custom code, hub data, bundled tasks)."""
    found = index.get(name)
    source = found.source(name) if found else None
    if source is not None:
        return source
    from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity

    with quiet():
        task = load_task(manager_of(tasks_dir, bundled=found is None), name, index)
        docs = [dict(doc) for doc in task.eval_docs]
        shots = list(task.fewshot_docs() or ()) if suite.num_fewshot or task.config.num_fewshot else []
    filters = [f.name for f in task._filters]
    ratios = {perplexity: "perplexity", weighted_perplexity: "weighted_perplexity", bits_per_byte: "bits_per_byte"}
    how = {m: found for m, found in task.aggregation().items() if found is mean or found in ratios}
    better = task.higher_is_better()
    named = {metric_name(m, f, filters): m for f in filters for m in how}
    parts = [files_digest(found.files, found.path.parent) if found else name, docs, shots]
    return Source(
        name,
        str(task.OUTPUT_TYPE),
        tuple(named),
        frozenset(full for full, m in named.items() if not better.get(m, True)),
        docs,
        digest_of(repr(parts).encode()),
        bundled=found is None,
        ratios={full: ratios[how[m]] for full, m in named.items() if how[m] in ratios},
    )


def manager_of(tasks_dir: Path, *, bundled: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_dir), include_defaults=bundled)  # with defaults: 14,000 files, 4 s


def load_task(manager: Any, name: str, known: Sequence[str] | Mapping[str, Any]) -> Any:
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
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        RuntimeError,
        AttributeError,
        IndexError,
        TypeError,
        TemplateError,
    ) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") or os.environ.get("HF_DATASETS_OFFLINE") == "1"
        hint = (
            f"The hub is switched off: unset HF_HUB_OFFLINE, or copy the task on a connected machine: workbench scores export {shell(name)}"
            if offline
            else "Check the task's data and code."
        )
        raise WorkbenchError(f"task '{name}' could not be loaded: {type(error).__name__}: {str(error)[:300]}", hint) from error
    return loaded[name]


def load_tasks(plan: Plan) -> dict[str, Any]:
    """lm-eval's task objects of a plan, with the settings that lm-eval's own front end would make."""
    managers = {bundled: manager_of(plan.tasks_dir, bundled=bundled) for bundled in {t in plan.bundled for t in plan.suite.tasks}}
    tasks = {name: load_task(managers[name in plan.bundled], name, plan.suite.tasks) for name in plan.suite.tasks}
    for task in tasks.values():
        own, asked = task.get_config("num_fewshot"), plan.suite.num_fewshot
        if own == 0 and asked:  # lm-eval would go on without examples
            raise WorkbenchError(
                f"task '{task.task_name}' fixes num_fewshot: 0, the suite asks for {asked}",
                "Leave num_fewshot out of the task's YAML, or out of the suite.",
            )
        task.set_config(key="num_fewshot", value=own or 0 if asked is None else asked)
    return tasks
