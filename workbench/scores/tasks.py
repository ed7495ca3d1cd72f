"""Local lm-eval tasks as files: their definitions and metrics, read without importing lm_eval or task code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.yamldoc import MAX_BYTES
from workbench.scores.statistics import RATIOS

# Metrics of lm-eval 0.4.13 for tasks without a metric_list (DEFAULT_METRIC_REGISTRY).
DEFAULT_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
# lm-eval's default aggregations of its own metrics; metrics that are not listed are means over items.
AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
    "f1": "f1",
    "mcc": "matthews_corrcoef",
    "bleu": "bleu",
    "chrf": "chrf",
    "chrf++": "chrf++",
    "ter": "ter",
    "bypass": "bypass",
}
BRIER = "brier_score"  # mean over multiple-choice items of the squared distances of probabilities from the right choice
MEANS = ("mean", BRIER)
_RATIOS = tuple(metric for metric, how in AGGREGATIONS.items() if how in RATIOS)
LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
_OUTPUTS = {  # the output type for which lm-eval itself computes a metric that is not a mean
    "perplexity": "loglikelihood",
    **dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"), "loglikelihood_rolling"),
    **dict.fromkeys(("f1", "mcc"), "multiple_choice"),
    **dict.fromkeys(("bleu", "chrf", "chrf++", "ter"), "generate_until"),
}

_SKIPPED = "Correct the file; lm-eval would silently skip it."

_READERS = ("json", "csv", "parquet", "text")  # values of `dataset_path` that stand for the readers of files in `datasets`

MAX_LEVELS = 12
"""Maximum depth of lists and objects in a document. `datasets` visits each value twice per level, so that 40 levels would take days."""


@dataclass(frozen=True)
class TaskSource:
    """A task's documents and identity.

    Attributes:
        name: Name of the task.
        kind: lm-eval's output type.
        metrics: Metrics, those of a whole corpus last; the first one is the default primary metric.
        lower: Metrics where lower is better.
        docs: Documents in the order of the file.
        digest: Digest of the task's definition, its code and the output of the built task.
        ratios: lm-eval's aggregation by metric, for metrics that are no means: ratios of sums (`statistics.RATIOS`), and those of a whole corpus.
        filters: Names of the task's filters, in order.
        bundled: True for tasks that come with lm-eval.
    """

    name: str
    kind: str
    metrics: tuple[str, ...]
    lower: frozenset[str]
    docs: Sequence[Mapping[str, object]]
    digest: str
    ratios: Mapping[str, str]
    filters: tuple[str, ...]
    bundled: bool = False


class _Function(str):
    """A `!function module.name` in a task file."""


class _TaskLoader(yaml.SafeLoader):
    """YAML loader for lm-eval tasks that keeps functions as names and imports no code."""


_TaskLoader.add_constructor("!function", lambda _, node: _Function(node.value))


@dataclass(frozen=True)
class TaskFile:
    """A local task: its merged configuration and the files that define it (definition, includes and their function files)."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    def check(self, name: str) -> tuple[Path, ...]:
        """Check a task's data files and return their paths.

        Raises:
            WorkbenchError: If the task has no data, a file is missing, a line is not JSON, or the test data are empty.
        """
        config = self.config
        if not config.get("dataset_path") and not config.get("custom_dataset"):
            raise WorkbenchError(
                f"{self.path}: task '{name}' has no data: neither dataset_path nor custom_dataset",
                "Add `custom_dataset: !function localdata.jsonl` and `dataset_kwargs: {data_files: {test: data/NAME.jsonl}}`, or dataset_path.",
            )
        kwargs = config.get("dataset_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise WorkbenchError(
                f"{self.path}: task '{name}': dataset_kwargs: expected a mapping, found {type(kwargs).__name__}", None
            )
        data_files = kwargs.get("data_files")
        if not config.get("custom_dataset") or not isinstance(data_files, dict):
            return ()
        paths = {split: self.path.parent / str(p) for split, p in data_files.items()}
        for path in paths.values():
            if not path.is_file():
                raise WorkbenchError(
                    f"{self.path}: task '{name}': data file {path} not found", "Generate it, or correct `data_files`."
                )
        lines = {split: path for split, path in paths.items() if path.suffix == ".jsonl"}
        docs = {split: _read_jsonl(path, name) for split, path in lines.items()}
        test = str(config.get("test_split") or config.get("validation_split"))
        if docs.get(test) == []:
            raise WorkbenchError(f"task '{name}' has no items", "Its test data are empty: generate or restore them.")
        return tuple(paths.values())

    @property
    def local_data(self) -> tuple[Path, ...] | None:
        """Files of a task whose documents a reader of `datasets` takes from local files; None for other tasks.

        `dataset_path: json` and `data_files: {test: FILE}`; paths are relative to the working directory.
        """
        kwargs = self.config.get("dataset_kwargs")
        data_files = kwargs.get("data_files") if isinstance(kwargs, dict) and set(kwargs) == {"data_files"} else None
        named = [data_files] if isinstance(data_files, str) else list(data_files.values()) if isinstance(data_files, dict) else []
        paths = tuple(Path(name).resolve() for name in named if isinstance(name, str))
        known = self.config.get("dataset_path") in _READERS and not self.config.get("custom_dataset")
        return paths if known and paths and len(paths) == len(named) and all(path.is_file() for path in paths) else None

    @property
    def definition(self) -> dict[str, object]:
        """Configuration without the names of its data files, because their content is part of the digest instead."""
        kwargs = self.config.get("dataset_kwargs")
        if not isinstance(kwargs, dict):
            return dict(self.config)
        return {**self.config, "dataset_kwargs": {k: v for k, v in kwargs.items() if k != "data_files"}}


def listed_metrics(config: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Return a task's metrics as in the stored rows, those where lower is better, and the aggregation by name of those that are no means."""
    kind = str(config.get("output_type", "generate_until"))
    aggregations: dict[str, str] = {}
    lower: set[str] = set()
    filters = [f["name"] for f in config.get("filter_list") or [{"name": "none"}]]
    for by in filters:
        for entry in config.get("metric_list") or [{"metric": m} for m in DEFAULT_METRICS.get(kind, ())]:
            metric = str(entry["metric"])
            aggregation = str(entry.get("aggregation", AGGREGATIONS.get(metric, "mean")))
            output = kind if config.get("process_results") else _OUTPUTS.get(metric, kind)
            mean_of_sums = metric in _RATIOS and not config.get("process_results") and aggregation not in RATIOS
            if aggregation == "bypass" or mean_of_sums or (output != kind and (metric in _RATIOS or aggregation not in MEANS)):
                continue
            name = metric_name(metric, by, filters)
            aggregations[name] = aggregation
            if not entry.get("higher_is_better", metric not in LOWER):
                lower.add(name)
    return ordered(aggregations), frozenset(lower), {name: how for name, how in aggregations.items() if how not in MEANS}


def ordered(aggregations: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of metrics with those of a whole corpus last, so that the first one has scores of items if any metric has."""
    return tuple(sorted(aggregations, key=lambda name: aggregations[name] not in (*MEANS, *RATIOS)))


def metric_name(metric: str, by: str, filters: Sequence[str]) -> str:
    """Return the stored name of a metric: `metric` for a task's first filter, `metric,filter` for other filters."""
    return metric if by == filters[0] else f"{metric},{by}"


def task_index(tasks_dir: Path) -> dict[str, TaskFile]:
    """Return local tasks by name from all *.yaml files below a folder, as lm-eval finds them.

    Raises:
        WorkbenchError: If a file is not YAML or a task is defined twice.
    """
    tasks: dict[str, TaskFile] = {}
    for path in sorted(tasks_dir.rglob("*.yaml")):
        config, files = _task_config(path.resolve(), ())
        name = config.get("task")
        if isinstance(name, str) and "group" not in config:
            if name in tasks:
                raise WorkbenchError(f"{path}: task '{name}' is also defined in {tasks[name].path}", "Rename one of the two.")
            tasks[name] = TaskFile(path.resolve(), config, files)
    return tasks


def group_files(tasks_dir: Path) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Return groups by name from all *.yaml files below a folder with a field `group`, as lm-eval finds them."""
    groups: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path in sorted(tasks_dir.rglob("*.yaml")):
        if "group:" in path.read_text("utf-8"):
            config, _ = _task_config(path.resolve(), ())
            if isinstance(name := config.get("group"), str):
                groups[name] = (path.resolve(), config)
    return groups


def _task_config(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return a task file's definition merged with its includes, and the files that define it."""
    if path in parents:
        raise WorkbenchError(f"{path}: the file includes itself", "Remove the cycle of includes.")
    try:
        text = path.read_text("utf-8")
        config = yaml.load(text[: MAX_BYTES + 1], _TaskLoader)  # noqa: S506, TID251  a SafeLoader
    except FileNotFoundError:
        raise WorkbenchError(f"{parents[-1]}: included file {path} not found", None) from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}:{error.problem_mark.column + 1}" if error.problem_mark else ""
        raise WorkbenchError(f"{path}{line}: not YAML: {error.problem}", _SKIPPED) from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # UTF-16, a date such as 2026-13-45, an explicit tag without a value that it fits, endless nesting
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n")[0][:120]
        raise WorkbenchError(f"{path}: not YAML: {reason}", _SKIPPED) from None
    if len(text) > MAX_BYTES or _is_large(config):
        raise WorkbenchError(
            f"{path}: the file is too large, nested too deeply, or has too many aliases", "Put the items into a separate file."
        )
    if not isinstance(config, dict):
        raise WorkbenchError(f"{path}: expected a mapping, found {type(config).__name__}", None)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    files = [path, *(path.parent / f"{f.rpartition('.')[0].replace('.', '/')}.py" for f in _functions(config))]
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str) or "\0" in name:
            raise WorkbenchError(f"{path}: include: expected the names of task files, found {name!r:.60}", None)
        inner, more = _task_config((path.parent / name).resolve(), (*parents, path))
        merged.update(inner)
        files.extend(more)
    return {**merged, **config}, tuple(dict.fromkeys(f for f in files if f.is_file()))


def _is_large(config: Any) -> bool:
    """Return True if a definition with expanded aliases has more than 100,000 values or 100 levels."""
    count, level = 0, [config]
    for _ in range(100):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in islice(value.values() if isinstance(value, dict) else value, 100_000 - count)
        ][: 100_001 - count]
        count += len(level)
        if not level or count > 100_000:
            return bool(level)
    return True


def _functions(value: Any) -> list[_Function]:
    if isinstance(value, _Function):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [f for v in inner for f in _functions(v)]


def _read_jsonl(path: Path, task: str) -> list[dict[str, Any]]:
    """Read a task's documents, one JSON object per line."""
    docs = []
    # splitlines() would also split at other line separators, which JSON strings may contain.
    for number, line in enumerate(jsondoc.text_of(path, f"{path}: task '{task}'").split("\n"), 1):
        if line.strip():
            place, hint = f"{path}:{number}: task '{task}'", "Write one JSON object per line."
            docs.append(jsondoc.as_object(jsondoc.parse(line, place, hint), place, hint))
            if jsondoc.is_deep(docs[-1], MAX_LEVELS):
                raise WorkbenchError(f"{place}: the document has more than {MAX_LEVELS} levels", "Flatten the document.")
    return docs
