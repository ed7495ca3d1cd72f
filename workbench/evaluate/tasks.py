"""lm-eval's task objects, local or bundled, with the settings that lm-eval's own front end applies."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.evaluate.gate import functions_checked, sandbox_templates, score_first, watched, yielded
from workbench.evaluate.measured import quiet
from workbench.ground.errors import WorkbenchError, nearest, shell
from workbench.ground.files import bytes_digest
from workbench.ground.http import refused_cache
from workbench.scores.groups import local_groups
from workbench.scores.plan import GENERATED, ScorePlan
from workbench.scores.suite import Aggregate, Suite, TaskGroup
from workbench.scores.task_code import code_of, content, recall, remember
from workbench.scores.tasks import MEANS, TaskFile, TaskSource, listed_metrics, metric_name, ordered

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable that allows tasks to run the model's code; the metric `code_eval` asks for the same."""


def source_of(name: str, suite: Suite, index: Mapping[str, TaskFile], tasks_dir: Path, memo: Path | None = None) -> TaskSource:
    """Return a task's content, from the memo if no file that affects it has changed, else from lm-eval.

    Args:
        name: Name of the task.
        suite: The suite.
        index: Local task files by name.
        tasks_dir: Folder of local task files.
        memo: Folder with memos of local tasks; None: build the task.
    """
    file = index.get(name)
    if file is None:
        with quiet(), foreign_code(name, "built"):
            return _from_lm_eval(name, suite, index, tasks_dir)
    code = code_of(file.files, file.path.parent)
    memo_file = memo / f"{bytes_digest(json.dumps([str(file.path), name, suite.num_fewshot]).encode())}.json" if memo else None
    if memo_file and (remembered := recall(memo_file, code, file.files)):
        return remembered
    data = file.check(name)
    with watched(code) as reads, quiet(), foreign_code(name, "built"):
        task = load_task(manager_of(tasks_dir, bundled=False), name, index)
        if suite.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=suite.num_fewshot)
        docs, yields = [dict(doc) for doc in task.eval_docs], yielded(task)
        score_first(task)
    input_files = {*code.files, *code.named, *reads[0].files} - {
        path.resolve() for path in (*data, *file.files) if path.suffix != ".py"
    }
    parts = [name, file.definition, yields, content(p for p in input_files if not _is_cache(p))]
    metrics, lower, ratios = listed_metrics(file.config) if "class" not in file.config else _metrics(task)
    digest = bytes_digest(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    filters = tuple(f.name for f in task._filters)
    source = TaskSource(name, str(task.OUTPUT_TYPE), metrics, lower, docs, digest, ratios=ratios, filters=filters)
    local = file.local_data or ()
    if memo_file and (local or (file.config.get("custom_dataset") and not file.config.get("dataset_path"))):
        remember(memo_file, source, code, reads[0], [*file.files, *data, *local])
    return source


def _is_cache(path: Path) -> bool:
    """Return whether a file belongs to the caches of the hub or of datasets; documents represent their content."""
    from datasets.config import HF_CACHE_HOME

    return path.is_relative_to(Path(HF_CACHE_HOME).expanduser().resolve())


def _from_lm_eval(name: str, suite: Suite, index: Mapping[str, TaskFile], tasks_dir: Path) -> TaskSource:
    """Build a task that comes with lm-eval: lm-eval's version represents its code, and documents are used as they are loaded."""
    task = load_task(manager_of(tasks_dir, bundled=True), name, index)
    docs = [dict(doc) for doc in task.eval_docs]
    shots = list(task.fewshot_docs() or ()) if suite.num_fewshot or task.config.num_fewshot else []
    metrics, lower, ratios = _metrics(task)
    digest = bytes_digest(repr([name, docs, shots]).encode())
    return TaskSource(
        name,
        str(task.OUTPUT_TYPE),
        metrics,
        lower,
        docs,
        digest,
        bundled=True,
        ratios=ratios,
        filters=tuple(f.name for f in task._filters),
    )


def _metrics(task: Any) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Return what `scores.tasks.listed_metrics` returns, for a task without a file in the project."""
    from lm_eval.api import metrics  # noqa: F401  registers the aggregations
    from lm_eval.api.registry import aggregation_registry

    filters = [f.name for f in task._filters]
    registered = {function: name for name, function in aggregation_registry.items()}
    aggregations, better = {}, task.higher_is_better()
    for by in filters:
        for metric, function in task.aggregation().items():
            own = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', type(function).__name__)}"
            if (how := registered.get(function, own)) != "bypass":
                aggregations[metric_name(metric, by, filters)] = how
    lower = frozenset(name for name in aggregations if not better.get(name.partition(",")[0], True))
    return ordered(aggregations), lower, {name: how for name, how in aggregations.items() if how not in MEANS}


def manager_of(tasks_dir: Path, *, bundled: bool) -> Any:
    """Return lm-eval's task manager for a folder, with lm-eval's own tasks if `bundled`."""
    from lm_eval.tasks import TaskManager

    sandbox_templates()
    return TaskManager(include_path=str(tasks_dir), include_defaults=bundled)  # lm-eval's defaults are 14,000 files and take 4 s


def load_task(manager: Any, name: str, known: Iterable[str]) -> Any:
    """Load one task.

    Args:
        manager: lm-eval's task manager.
        name: Name of the task.
        known: Names to suggest if the task is unknown.

    Raises:
        WorkbenchError: If the name is unknown or a group, the data cannot be loaded, or lm-eval's evaluator would refuse the task here:
            it runs code that the model writes and the user has not allowed that, or shows images or sounds.
    """
    if name not in manager.all_tasks:
        close = nearest(name, known)
        raise WorkbenchError(
            f"unknown task '{name}'", close if close.startswith("Did") else nearest(name, manager.all_subtasks)[:300]
        )
    if name not in manager.all_subtasks:
        raise WorkbenchError(
            f"'{name}' is a group of tasks", "List it under the suite's `tasks`, where a group stands for all its tasks."
        )
    task = _load(manager, name)["tasks"][name]
    if getattr(task, "UNSAFE_CODE", False) and os.environ.get(ALLOW_CODE) != "1":
        raise WorkbenchError(
            f"task '{name}' runs code that the model writes, with your rights",
            f"Allow it with {ALLOW_CODE}=1, on a machine or in a container where such code can do no harm.",
        )
    if getattr(task, "MULTIMODAL", False):
        raise WorkbenchError(
            f"task '{name}' shows images or sounds, and the scorer reads text alone",
            f"Score it with lm-eval on the model that `workbench run` writes: lm_eval --model hf-multimodal --tasks {shell(name)}",
        )
    return task


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Load a task or a group; return lm-eval's tasks and groups by name."""
    with foreign_code(name, "loaded"), functions_checked():
        loaded: dict[str, Any] = manager.load([name])
    return loaded


@contextmanager
def foreign_code(name: str, done: str) -> Iterator[None]:
    """Turn exceptions of lm-eval, `datasets` or a task's own code into a WorkbenchError that names the task.

    Args:
        name: Name of the task.
        done: Action that failed: "loaded" or "built".
    """
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("lm_eval", "datasets"):
            raise  # the task is not to blame: lm-eval itself is not installed
        if refused := refused_cache(error, f"task '{name}'"):
            raise refused from error
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") or os.environ.get("HF_DATASETS_OFFLINE") == "1"
        away = "is offline: unset HF_HUB_OFFLINE" if offline else "cannot be reached: check the network"
        hint = (
            f"The hub {away}, or copy the task on a connected machine: workbench scores export {shell(name)}"
            if isinstance(error, (OSError, ValueError, ImportError, RuntimeError) if offline else ConnectionError)
            else "Check the task's data and code; WORKBENCH_DEBUG=1 shows where it failed."
        )
        raise WorkbenchError(f"task '{name}' could not be {done}: {type(error).__name__}: {str(error)[:300]}", hint) from error


def groups_of(suite: Suite, index: Mapping[str, TaskFile], tasks_dir: Path) -> dict[str, list[TaskGroup]]:
    """Return the groups that a suite lists, each with its subgroups, both local groups and those of lm-eval."""
    local = local_groups(tasks_dir, index)
    groups = {name: local[name] for name in suite.tasks if name in local}
    unknown = [name for name in suite.tasks if name not in local and name not in index]
    manager = manager_of(tasks_dir, bundled=True) if unknown else None
    for name in unknown:
        if manager is not None and name in manager.all_groups:
            with quiet():
                group = _load(manager, name)["groups"][name]
            groups[name] = [_group(one) for one in (group, *group.get_all_groups())]
    return groups


def _group(group: Any) -> TaskGroup:
    aggregates = [
        Aggregate(
            metric=a.metric,
            filters=None if a.filter_list is None else tuple(a.filter_list),
            weighted=bool(a.weight_by_size),
        )
        for a in group.aggregate_metric_list or ()
    ]
    return TaskGroup(
        name=group.name,
        alias=group.alias or group.name,
        tasks=tuple(task.task_name for task in group.get_all_tasks()),
        aggregates=tuple(aggregates),
    )


def load_tasks(plan: ScorePlan) -> dict[str, Any]:
    """Return lm-eval's task objects of a plan, with the settings that lm-eval's own front end applies."""
    managers = {bundled: manager_of(plan.tasks_dir, bundled=bundled) for bundled in {t in plan.bundled for t in plan.suite.tasks}}
    tasks = {name: load_task(managers[name in plan.bundled], name, plan.suite.tasks) for name in plan.suite.tasks}
    for task in tasks.values():
        task_shots, suite_shots = task.get_config("num_fewshot"), plan.suite.num_fewshot
        if task_shots == 0 and suite_shots:  # lm-eval would silently use no examples
            raise WorkbenchError(
                f"task '{task.task_name}' sets num_fewshot: 0, but the suite sets {suite_shots}",
                "Remove num_fewshot from the task's YAML, or from the suite.",
            )
        task.set_config(key="num_fewshot", value=task_shots or 0 if suite_shots is None else suite_shots)
        if plan.suite.gen_kwargs and task.OUTPUT_TYPE == GENERATED:
            task.set_config(key="generation_kwargs", value=copy.deepcopy(plan.suite.gen_kwargs), update=True)
    return tasks
