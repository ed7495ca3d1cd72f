"""Import of lm-eval runs into the score store, from the `samples_TASK_DATE.jsonl` files that `lm_eval --log_samples` writes.

Imported runs are compared like any others if their documents, prompts, gold answers and filters are the same, which the plan's digest covers.
Each metric is computed from its samples and compared with lm-eval's `results_DATE.json` of the same run.
Weights, tokenizer and dtype are not known: a run is identified by its name and its numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from workbench.evaluate.gold import corpus_contributions
from workbench.exchange.reported import Reported
from workbench.exchange.samples import TaskSamples, read_samples
from workbench.ground.errors import UsageError, WorkbenchError, nearest
from workbench.ground.files import bytes_digest
from workbench.ground.jsondoc import read_object
from workbench.ground.recognize import expecting
from workbench.scores.files import Packed
from workbench.scores.groups import expanded
from workbench.scores.imported import differing_versions
from workbench.scores.plan import Item, PlanRecord, ScorePlan
from workbench.scores.statistics import codes
from workbench.scores.store import Configuration, Metric, Rows, Scores, ScoreStore, TaskScores, plan_record
from workbench.scores.suite import SUITE_NAME, Suite, TaskGroup, load_suite, metric_of

_FILE = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")
_FORMAT = "imported-2"
"""What the digest of an imported plan covers. Since 2, metrics are compared with lm-eval's results file."""


@dataclass(frozen=True)
class ImportedPlan(ScorePlan):
    """A plan of imported scores; `identities` holds by task the digest that must be equal for two runs to be comparable."""

    identities: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Digest of documents, requests, targets, filters, metrics and clusters; tokenizer, dtype and weights are not known."""
        return _digest([_FORMAT, *self.identities.items()])

    def record(self) -> PlanRecord:
        """Return the content of plan.json, marked as imported."""
        plain = super().record()
        tasks = {task: about.model_copy(update={"digest": self.identities[task]}) for task, about in plain.tasks.items()}
        unknown = dict.fromkeys(("tokenizer", "dtype", "batch_size"))
        return plain.model_copy(update={**unknown, "imported": True, "import_format": _FORMAT, "versions": {}, "tasks": tasks})


@dataclass(frozen=True)
class ImportedRun:
    """The result of an import; `new` is False if the store already had the same numbers under this name."""

    scores: Scores
    plan: ScorePlan
    new: bool
    notes: tuple[str, ...]


def import_samples(
    files: Sequence[Path],
    store: ScoreStore,
    *,
    name: str | None = None,
    suite: str | None = None,
    cluster: str | None = None,
    higher: Mapping[str, bool] | None = None,
    project: Path | None = None,
) -> list[ImportedRun]:
    """Import lm-eval's sample files into the store, one configuration per folder.

    Args:
        files: `samples_TASK_DATE.jsonl` files, folders of such files (the newest file of each task is used), or folders of such folders.
        store: The store.
        name: Name of the configuration if all files are in one folder; default: the folder's name.
        suite: Name of the suite; default: "imported". Its file below the project gives roles, tolerances and other settings of the comparison.
        cluster: Field of the documents with their cluster; default: the suite's, or `cluster` if all documents have it, else each item is its
            own cluster.
        higher: Whether higher is better, by metric; default: what the results file or the metric's name says.
        project: The project.

    Raises:
        WorkbenchError: If a file does not exist, nothing tells whether higher values of a primary metric are better, two files belong to one task, a line has another form, a metric differs from lm-eval's results
            file, a task is not in the suite's file, or the name already has other numbers.
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
    suite = suite or "imported"
    if not re.fullmatch(SUITE_NAME, suite):
        raise UsageError(f"--suite {suite}: expected letters, digits, '.', '_' and '-'", "--suite my-suite")
    found = project is not None and (project / "evals" / "suites" / f"{suite}.yaml").is_file()
    declared = load_suite(suite, project) if found and project else None
    compute = corpus_contributions if find_spec("lm_eval") else None
    reader, ready = partial(read_samples, compute=compute, seen={}), list[_Folder]()
    for folder, tasks in folders.items():  # what a folder holds is packed before the next one is read
        one = _Folder.read(tasks, name or folder.name, suite, declared, cluster, reader, higher or {})
        before = ready[-1] if ready else one
        if before is not one and before.plan == one.plan:
            ready.append(replace(one, plan=before.plan, items=before.items))
        else:
            ready.append(replace(one, items=Packed.of(cast("Rows", one.items))))
    runs = _keep(ready, store)
    plans = {run.plan.digest: run.plan for run in runs}.values()
    versions = differing_versions([scores for plan in plans for scores in store.list(plan)])
    return [replace(run, notes=(*run.notes, *versions)) if run is runs[-1] else run for run in runs]


_WRITTEN = "lm_eval writes such files with --log_samples --output_path DIR into DIR/MODEL/."


def _expanded(files: Iterable[Path]) -> list[Path]:
    """Return the files; a folder stands for the newest file of each task in it, and in each of its folders."""
    expanded: dict[Path, None] = {}
    for file in files:
        if file.is_dir():
            inner = sorted((*file.glob("samples_*.jsonl"), *file.glob("*/samples_*.jsonl")), key=_date_of)
            with expecting(file, "results of lm-eval with items"):
                if not inner:
                    raise WorkbenchError(f"{file}: neither the folder nor a folder in it has samples_*.jsonl files", _WRITTEN)
            newest = {(p.parent, _task_of(p)): p for p in inner}
            expanded.update(dict.fromkeys(newest[key] for key in sorted(newest)))
        elif file.is_file():
            with expecting(file, "results of lm-eval", "lm-eval"):
                _task_of(file)
            expanded[file] = None
        else:
            raise WorkbenchError(f"{file}: the file does not exist", _WRITTEN)
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


@dataclass(frozen=True)
class _Folder:
    """The samples of one folder.

    Attributes:
        folder: The folder.
        plan: Their plan.
        scores: The scores under the configuration's name.
        rows: Their rows.
        items: Their items.
        notes: What a reader of the scores should know.
    """

    folder: Path
    plan: ImportedPlan
    scores: Scores
    rows: Packed
    items: Rows | Packed
    notes: tuple[str, ...]

    @classmethod
    def read(
        cls,
        tasks: Mapping[str, Path],
        name: str,
        suite: str,
        declared: Suite | None,
        cluster: str | None,
        reader: Callable[..., TaskSamples],
        higher: Mapping[str, bool],
    ) -> _Folder:
        """Read the files of a folder, by task, and make their plan."""
        folder = next(iter(tasks.values())).resolve().parent
        documents: dict[Path, dict[str, object]] = {}
        for file in tasks.values():
            path = folder / f"results_{_date_of(file)}.json"
            if path not in documents and path.is_file():
                documents[path] = read_object(
                    path,
                    infinite=True,
                    hint="Run lm_eval again into an empty folder, or remove the file: then nothing is compared.",
                )
        results = [documents[path] for path in sorted(documents, reverse=True)]
        if declared is not None:
            declared = _with_tasks(declared, tasks, results)
        samples = []
        for task, file in sorted(tasks.items()):
            path = folder / f"results_{_date_of(file)}.json"
            reported = Reported.of(task, path, documents[path]) if path in documents else Reported()
            field = cluster or (declared.cluster_of(task) if declared and "cluster" in declared.model_fields_set else None)
            reported = replace(reported, higher={**reported.higher, **higher})
            samples.append(reader(task, file, field, reported))
        plan, rows = _plan(samples, suite, declared), {s.task: s.rows for s in samples}
        # The name is part of the identity: two models may have the same numbers on a few items.
        scores = _scores(samples, plan, results, Configuration(_digest([name, rows]), name))
        notes = [note for s in samples for note in s.notes]
        if alone := [s.task for s in samples if s.reported.file is None]:
            beside = f"no results_DATE.json beside the samples of {', '.join(alone)}"
            notes.append(f"{folder.name}: {beside}: their metrics are not checked")
        return cls(folder, plan, scores, Packed.of(rows), {s.task: s.items for s in samples}, tuple(notes))


def _keep(ready: Sequence[_Folder], store: ScoreStore) -> list[ImportedRun]:
    """Store each folder as one configuration; nothing is stored if one of them contradicts what is there."""
    stored: dict[str, dict[str, Scores]] = {}
    new = []
    for read in ready:
        plan, suite, mine = read.plan, read.plan.suite.suite, read.scores.configuration
        folder = store.folder(suite, plan.digest)
        if plan.digest not in stored and folder.joinpath("plan.json").is_file():
            for task, about in plan_record(folder).tasks.items():
                for metric in {*about.lower} ^ {*plan.lower[task]}:
                    raise WorkbenchError(
                        f"{read.folder}: in suite '{suite}', {'lower' if metric in about.lower else 'higher'} values of '{metric}' are better on "
                        f"'{task}', and these samples say the opposite",
                        f"Import it with --{'lower' if metric in about.lower else 'higher'} {metric_of(metric)}, or into another --suite.",
                    )
        known = stored.setdefault(plan.digest, {s.configuration.name: s for s in store.list(plan)})
        if known.setdefault(mine.name, read.scores).configuration.digest != mine.digest:
            other = known[mine.name].configuration.digest[:12]
            raise WorkbenchError(
                f"{read.folder}: suite '{suite}' already has other numbers of '{mine.name}' on the same items",
                f"Use another name: --name {mine.name}-2. To replace the old run: rm {folder}/{other}.json*",
            )
        new.append(known[mine.name] is read.scores)
    runs = []
    for read, first in zip(ready, new, strict=True):
        plan, known, name = read.plan, stored[read.plan.digest], read.scores.configuration.name
        if first:
            known[name] = store.write(plan, read.scores, read.rows, read.items)
        else:
            store.write_plan(plan)  # the suite's roles may have changed
        runs.append(ImportedRun(known[name], plan, first, read.notes))
    return runs


def _with_tasks(declared: Suite, tasks: Mapping[str, Path], results: Sequence[Mapping[str, object]]) -> Suite:
    """Return a suite's file with the imported tasks; groups are those of the results files."""
    members: dict[str, list[str]] = {}
    for document in results:
        members |= {
            str(g): [str(t) for t in m] for g, m in _mapping(document.get("group_subtasks")).items() if isinstance(m, list)
        }

    def leaves(name: str, depth: int = 8) -> list[str]:
        inner = [leaf for member in members.get(name, ()) for leaf in (leaves(member, depth - 1) if depth else ())]
        return inner or [name]

    groups = {
        name: [TaskGroup(name=name, alias=name, tasks=tuple(dict.fromkeys(leaves(name))))]
        for name in members
        if leaves(name) != [name]
    }
    suite = expanded(declared, groups)
    for task in tasks:
        if task not in suite.tasks:
            raise WorkbenchError(
                f"evals/suites/{suite.suite}.yaml has no task '{task}', but its samples are imported. {nearest(task, suite.tasks)}",
                "Add the task to the suite's file, or use another --suite.",
            )
    return suite.only(tasks)


def _plan(samples: Sequence[TaskSamples], suite: str, declared: Suite | None) -> ImportedPlan:
    """Return the plan of imported samples.

    The primary metric is the suite's, else the first one that is a mean and whose better direction is known, else the first mean, else the
    first one.
    """
    primary = {}
    for s in samples:
        means = [m for m in s.metrics if m not in s.ratios]
        primary[s.task] = next((m for m in means if s.reported.is_higher(m) is not None), (means or s.metrics)[0])
    for s in samples:
        chosen = declared.primary.get(s.task) if declared else None
        if chosen is not None and chosen not in s.metrics:
            raise WorkbenchError(
                f"evals/suites/{suite}.yaml: primary: the samples of '{s.task}' have no metric '{chosen}' that can be compared",
                "; ".join(s.notes) or nearest(chosen, s.metrics),
            )
        if s.reported.is_higher(metric := chosen or primary[s.task]) is None:
            name = metric_of(metric)
            raise WorkbenchError(
                f"{s.file}: no results file beside the samples says whether higher or lower values of '{name}' are better",
                f"Say it: --lower {name} or --higher {name}. Or import the folder with its results_DATE.json.",
            )
    settings = {
        "description": "Imported from lm-eval's sample files",
        "tasks": tuple(s.task for s in samples),
        "primary": primary | (declared.primary if declared else {}),
    }
    made = (
        declared.model_copy(update={"suite": suite, **settings})
        if declared
        else Suite.model_validate({"suite": suite, **settings})
    )
    return ImportedPlan(
        suite=made,
        items={s.task: tuple(Item(item["id"], item["cluster"]) for item in s.items) for s in samples},
        kinds={s.task: s.kind for s in samples},
        metrics={s.task: s.metrics for s in samples},
        tokenizer=None,
        tokenizer_digest="",
        tasks_dir=Path(),
        dtype="",
        batch_size=0,
        lower={s.task: tuple(s.lower) for s in samples},
        ratios={s.task: dict(s.ratios) for s in samples},
        scorer="lm_eval",
        identities={s.task: _digest(s.identity) for s in samples},
    )


def _mapping(value: object) -> Mapping[str, object]:
    """Return the value if it is a mapping, else an empty one: files of other programs may hold anything."""
    return value if isinstance(value, dict) else {}


def _digest(value: Any) -> str:
    return bytes_digest(json.dumps(value, sort_keys=True).encode())


def _scores(
    samples: Sequence[TaskSamples], plan: ImportedPlan, results: Sequence[Mapping[str, object]], configuration: Configuration
) -> Scores:
    """Return the scores of the imported rows, with the device, time and versions from the results files."""
    newest = results[0] if results else {}
    device = _mapping(newest.get("config")).get("device")
    written = dict.fromkeys(s.reported.version for s in samples if s.reported.version)
    versions = {"lm_eval": " and ".join(map(str, written)), "transformers": newest.get("transformers_version")}
    return Scores(
        suite=plan.suite.suite,
        plan=plan.digest,
        configuration=configuration,
        seconds=_seconds(newest.get("total_evaluation_time_seconds")),
        device=str(device) if device else "not recorded",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={k: str(v) for k, v in versions.items() if v},
        tasks={s.task: TaskScores(n=len(s.rows), metrics=_metrics(s)) for s in samples},
    )


def _seconds(value: object) -> float:
    """Return the run's time, which lm-eval writes as a string; 0 for any other value."""
    try:
        seconds = round(float(str(value)), 2)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _metrics(samples: TaskSamples) -> dict[str, Metric]:
    cluster = codes([item["cluster"] for item in samples.items])
    return {m: Metric.of([row["metrics"][m] for row in samples.rows], cluster, samples.ratios.get(m)) for m in samples.metrics}
