"""Import of lm-eval runs into the score store, from the `samples_TASK_DATE.jsonl` files that `lm_eval --log_samples` writes.

Imported runs are compared like any others if their documents, prompts, gold answers and filters are the same, which the plan's digest covers.
Weights, tokenizer and dtype are not known: a run is identified by its name and its numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.errors import UsageError, WorkbenchError, nearest
from workbench.files import bytes_digest
from workbench.jsondoc import read_object
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.samples import TaskSamples, read_samples
from workbench.scores.statistics import codes
from workbench.scores.store import Configuration, Metric, Rows, Scores, ScoreStore, TaskScores, outdated, plan_record, stored_in
from workbench.scores.suite import SUITE_NAME, Suite

_FILE = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")
_FORMAT = "imported-1"
SCORER = "lm_eval"


@dataclass(frozen=True)
class ImportedPlan(ScorePlan):
    """A plan of imported scores; `identities` holds by task the digest that must be equal for two runs to be comparable."""

    identities: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Digest of documents, requests, targets, filters, metrics and clusters; tokenizer, dtype and weights are not known."""
        return _digest([_FORMAT, *self.identities.items()])

    def document(self) -> dict[str, Any]:
        """Return the content of plan.json, marked as imported."""
        document = super().document()
        tasks = {task: {**about, "digest": self.identities[task]} for task, about in document["tasks"].items()}
        unknown = dict.fromkeys(("tokenizer", "dtype", "batch_size"))
        return {**document, **unknown, "imported": True, "versions": {}, "tasks": tasks}


@dataclass(frozen=True)
class ImportedRun:
    """The result of an import; `new` is False if the store already had the same numbers under this name."""

    scores: Scores
    plan: ScorePlan
    new: bool
    notes: tuple[str, ...]


def import_samples(
    files: Sequence[Path], store: ScoreStore, *, name: str | None = None, suite: str | None = None, cluster: str | None = None
) -> list[ImportedRun]:
    """Import lm-eval's sample files into the store, one configuration per folder.

    Args:
        files: `samples_TASK_DATE.jsonl` files, or folders of such files (the newest file of each task is used).
        store: The store.
        name: Name of the configuration if all files are in one folder; default: the folder's name.
        suite: Name of the suite; default: "imported".
        cluster: Field of the documents with their cluster; default: `cluster` if all documents have it, else each item is its own cluster.

    Raises:
        WorkbenchError: If a file does not exist, two files belong to one task, a line has another form, or the name already has other numbers.
    """
    folders: dict[Path, dict[str, Path]] = {}
    for file in _expanded(files):
        task = _task_of(file)
        other = folders.setdefault(file.resolve().parent, {}).setdefault(task, file)
        if other != file:
            raise WorkbenchError(
                f"{file} and {other.name} both belong to task '{task}'", "Give only one of them: a run has one file per task."
            )
    if name and len(folders) > 1:
        raise WorkbenchError(
            f"--name {name}: the files are in {len(folders)} folders, which make {len(folders)} configurations",
            "Import each folder in a separate call with its own --name.",
        )
    samples_by_folder = {
        folder: [read_samples(task, file, cluster) for task, file in sorted(tasks.items())] for folder, tasks in folders.items()
    }
    return [
        _keep(folder, samples, store, name or folder.name, suite or "imported") for folder, samples in samples_by_folder.items()
    ]


def imported_suites(store: ScoreStore) -> list[str]:
    """Return the names of the suites of imported runs."""
    return sorted({plan["suite"]["suite"] for plan, _ in _plans(store)})


def find_imported(store: ScoreStore, suite: str, names: Sequence[str]) -> list[Scores]:
    """Return imported scores by name, in the order of the names, from the newest plan that has all of them.

    Without names, all scores of the newest plan are returned.

    Raises:
        WorkbenchError: If a name is unknown or the names are under different plans.
    """
    groups = [stored_in(folder) for plan, folder in _plans(store) if plan["suite"]["suite"] == suite]
    groups.sort(key=lambda group: max((s.created for s in group), default=""), reverse=True)
    if not names:
        return groups[0]
    for group in groups:
        by_name = {s.configuration.name: s for s in group}
        if all(name in by_name for name in names):
            return [by_name[name] for name in names]
    newest = {s.configuration.name: s for group in reversed(groups) for s in group}
    for name in names:
        if name not in newest:
            raise WorkbenchError(
                f"suite '{suite}' has no imported run '{name}'. {nearest(name, newest)}",
                "`workbench scores ls` lists all runs; `workbench scores import FILE... --name NAME` adds one.",
            )
    raise WorkbenchError(
        f"suite '{suite}': these runs are not comparable: {_differing([newest[name] for name in names], store)}",
        "Run lm_eval with the same tasks, --num_fewshot, --limit and chat template for all runs, and import them with the same --cluster.",
    )


def _differing(scores: Sequence[Scores], store: ScoreStore) -> str:
    """Describe a difference between two imported runs under different plans."""
    first_tasks = store.record(scores[0])["tasks"]
    for s in scores[1:]:
        tasks = store.record(s)["tasks"]
        pair = f"{scores[0].configuration.name} and {s.configuration.name}"
        if tasks.keys() != first_tasks.keys():
            return f"{pair} have different tasks ({', '.join(first_tasks)}; {', '.join(tasks)})"
        if changed := [t for t in tasks if tasks[t]["digest"] != first_tasks[t]["digest"]]:
            return f"{pair} have different documents, prompts, clusters or filters in {', '.join(changed)}"
    return "no plan has all of these runs"


def stored_plans(store: ScoreStore) -> list[dict[str, Any]]:
    """Return one document per plan in the store, by suite and the newest first: the content of `scores ls --json`."""
    documents = [_plan_document(path.parent) for path in store.root.glob("*/plan.json")]
    documents.sort(key=lambda plan: plan["created"], reverse=True)
    return sorted(documents, key=lambda plan: plan["suite"])


def _plan_document(folder: Path) -> dict[str, Any]:
    """Return the entry of `scores ls --json` for one plan."""
    plan, scores = plan_record(folder), stored_in(folder)
    return {
        "suite": plan["suite"]["suite"],
        "plan": plan["plan"],
        "imported": bool(plan.get("imported")),
        "scorer": plan["scorer"],
        "dtype": plan["dtype"],
        "batch_size": plan["batch_size"],
        "partial": bool(plan["partial"]),
        "tasks": {t: r["n"] for t, r in plan["tasks"].items()},
        "created": max((s.created for s in scores), default=""),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "unfinished": len(list(folder.glob("*.partial"))),
        "folder": folder.name,
        "outdated": outdated(plan, scores),
        "configurations": [
            {
                "name": s.configuration.name,
                "role": s.configuration.role,
                "digest": s.configuration.digest,
                "created": s.created,
                "aliases": sorted(a.name for a in s.aliases),
            }
            for s in scores
        ],
    }


def _plans(store: ScoreStore) -> list[tuple[dict[str, Any], Path]]:
    plans = [(plan_record(path.parent), path.parent) for path in sorted(store.root.glob("*/plan.json"))]
    return [(plan, folder) for plan, folder in plans if plan.get("imported") and stored_in(folder)]


def _expanded(files: Iterable[Path]) -> list[Path]:
    """Return the files, with each folder replaced by the newest file of each of its tasks."""
    expanded: dict[Path, None] = {}
    for file in files:
        if file.is_dir():
            inner = sorted((p for p in file.glob("samples_*.jsonl")), key=_date_of)
            if not inner:
                raise WorkbenchError(
                    f"{file}: the folder has no samples_*.jsonl files",
                    "lm_eval writes them with --log_samples --output_path DIR into DIR/MODEL/.",
                )
            expanded.update(dict.fromkeys({_task_of(p): p for p in inner}.values()))
        elif file.is_file():
            expanded[file] = None
        else:
            raise WorkbenchError(
                f"{file}: the file does not exist",
                "lm_eval writes sample files with --log_samples --output_path DIR into DIR/MODEL/.",
            )
    return list(expanded)


def _task_of(file: Path) -> str:
    """Return the task that a sample file's name contains."""
    if match := _FILE.fullmatch(file.name):
        return match["task"]
    if file.name.startswith("samples_") and file.suffix == ".jsonl":
        return file.stem.removeprefix("samples_")
    raise WorkbenchError(
        f"{file}: expected a file name of the form samples_TASK_DATE.jsonl",
        "Keep lm_eval's file names: they contain the names of the tasks.",
    )


def _date_of(file: Path) -> str:
    match = _FILE.fullmatch(file.name)
    return match["date"] if match else ""


def _keep(folder: Path, samples: Sequence[TaskSamples], store: ScoreStore, name: str, suite: str) -> ImportedRun:
    """Store the samples of a folder as one configuration."""
    results = _results(folder, [s.file for s in samples])
    plan = _plan(samples, suite, results)
    # The name is part of the identity: two models may have the same numbers on a few items.
    rows: Rows = {s.task: s.rows for s in samples}
    digest = _digest([name, rows])
    notes = tuple(note for s in samples for note in s.notes)
    for other in store.list(plan):
        if other.configuration.name != name:
            continue
        if other.configuration.digest == digest:
            if other.rows is not None:
                return ImportedRun(other, plan, False, notes)
            break  # stored by an earlier version without a digest of the rows: write it again
        raise WorkbenchError(
            f"{folder}: suite '{suite}' already has other numbers of '{name}' on the same items",
            f"Use another name: --name {name}-2. To replace the old run: rm {store.folder(suite, plan.digest)}/{other.configuration.digest[:12]}.json*",
        )
    scores = _scores(samples, plan, Configuration(digest, name), results)
    return ImportedRun(store.write(plan, scores, rows, {s.task: s.items for s in samples}), plan, True, notes)


def _plan(samples: Sequence[TaskSamples], suite: str, results: Mapping[str, Any]) -> ImportedPlan:
    """Return the plan of imported samples; the first metric that is a mean is the primary one."""
    if not re.fullmatch(SUITE_NAME, suite):
        raise UsageError(f"--suite {suite}: expected letters, digits, '.', '_' and '-'", "--suite my-suite")
    imported_suite = Suite.model_validate(
        {
            "suite": suite,
            "description": "Imported from lm-eval's sample files",
            "tasks": tuple(s.task for s in samples),
            "primary": {s.task: next((m for m in s.metrics if m not in s.ratios), s.metrics[0]) for s in samples},
        }
    )
    directions = _mapping(results.get("higher_is_better"))
    return ImportedPlan(
        suite=imported_suite,
        items={s.task: tuple(Item(item["id"], item["cluster"]) for item in s.items) for s in samples},
        kinds={s.task: s.kind for s in samples},
        metrics={s.task: s.metrics for s in samples},
        tokenizer=None,
        tokenizer_digest="",
        tasks_dir=Path(),
        dtype="",
        batch_size=0,
        lower={s.task: tuple(s.lower(_mapping(directions.get(s.task)))) for s in samples},
        ratios={s.task: dict(s.ratios) for s in samples},
        scorer=SCORER,
        identities={s.task: _digest(s.identity) for s in samples},
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one: files of other programs may hold anything."""
    return value if isinstance(value, dict) else {}


def _digest(value: Any) -> str:
    return bytes_digest(json.dumps(value, sort_keys=True).encode())


def _results(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Read lm-eval's results_DATE.json of the same run, if it is beside the samples."""
    for date in {_date_of(file) for file in files} - {""}:
        path = folder / f"results_{date}.json"
        if path.is_file():
            with contextlib.suppress(WorkbenchError):  # its content is only displayed
                return read_object(path, infinite=True)
    return {}


def _scores(samples: Sequence[TaskSamples], plan: ScorePlan, configuration: Configuration, results: Mapping[str, Any]) -> Scores:
    """Return the scores of the imported rows, with the device, time and versions from the results file."""
    versions = {"lm_eval": results.get("lm_eval_version"), "transformers": results.get("transformers_version")}
    settings = results.get("config")
    device = settings.get("device") if isinstance(settings, dict) else None
    return Scores(
        suite=plan.suite.suite,
        plan=plan.digest,
        configuration=configuration,
        seconds=_seconds(results.get("total_evaluation_time_seconds")),
        device=str(device) if device else "not recorded",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={k: str(v) for k, v in versions.items() if v},
        tasks={s.task: TaskScores(n=len(s.rows), metrics=_metrics(s)) for s in samples},
    )


def _seconds(value: Any) -> float:
    """Return the run's time, which lm-eval writes as a string; 0 for any other value."""
    try:
        seconds = round(float(value), 2)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _metrics(samples: TaskSamples) -> dict[str, Metric]:
    cluster = codes([item["cluster"] for item in samples.items])
    return {m: Metric.of([row["metrics"][m] for row in samples.rows], cluster, samples.ratios.get(m)) for m in samples.metrics}
