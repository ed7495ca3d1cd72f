"""Score plans: the tasks of a suite, their items, and the digest of everything that decides the scores.

This module imports neither torch nor lm_eval, so that stored scores are found quickly.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from pydantic import model_validator

from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.files import bytes_digest
from workbench.ground.identity import installed
from workbench.ground.results import JsonObject, Result, absent
from workbench.models.identity import tokenizer_digest
from workbench.scores.suite import MARGIN, SCORED_BY, SCORERS, Suite, TaskGroup
from workbench.scores.tasks import TaskSource

GENERATED = "generate_until"
"""lm-eval's output type of tasks that generate text."""
PLAN_FORMAT = "plan-4 softmax-float32 seed-1234"
"""What a plan's digest covers, and how scores are computed; part of the digest. Scores under another format are outdated."""


class PlannedTask(JsonObject):
    """A task of a plan."""

    n: int
    """Number of items."""
    kind: str
    """lm-eval's output type."""
    metrics: list[str]
    """Names of the metrics."""
    primary: str
    """Primary metric."""
    lower: list[str] = []
    """Metrics where lower is better."""
    ratios: dict[str, str] = {}
    """lm-eval's aggregation by metric, for metrics that are no means over items."""
    filters: list[str] = ["none"]
    """Names of the filters."""
    digest: str | None = absent()
    """For imported scores: digest of what must be equal for two runs to be comparable."""


class PlanRecord(Result):
    """The content of a plan.json. Imported plans know no tokenizer, dtype and batch size."""

    version: int = 1
    """Version of the file."""
    suite: dict[str, object]
    """The suite as it was when the plan was written."""
    plan: str
    """Digest of the plan."""
    tokenizer: str | None = None
    """Digest of the tokenizer whose chat template writes the prompts; null if the suite does not use it."""
    scorer: str
    """Scorer of log-likelihoods."""
    dtype: str | None
    """Dtype of the scored models."""
    batch_size: int | None
    """Requests per forward pass."""
    partial: bool
    """Whether a limit that is not in the suite cuts the items."""
    versions: dict[str, str]
    """Library -> version."""
    tasks: dict[str, PlannedTask]
    """Name -> task."""
    groups: list[TaskGroup] = []
    """The suite's groups and their subgroups."""
    imported: bool | None = absent()
    """True for scores that were imported from lm-eval's files."""
    import_format: str | None = absent()
    """What the digest of an imported plan covers."""
    format: str | None = absent()
    """What the digest of another plan covers, since 0.3."""

    @model_validator(mode="after")
    def _check_names(self) -> PlanRecord:
        if not isinstance(self.suite.get("suite"), str):
            raise ValueError("the suite has no name")
        for group in self.groups:
            if lacking := [task for task in group.tasks if task not in self.tasks]:
                raise ValueError(f"groups: {group.name}: '{lacking[0]}' is no task of the plan")
        return self

    @property
    def name(self) -> str:
        """Name of the suite."""
        return str(self.suite["suite"])


@dataclass(frozen=True)
class Item:
    """One item of a task: its id and its cluster."""

    id: str
    cluster: str


@dataclass(frozen=True)
class ScorePlan:
    """A suite on fixed items with one scorer, dtype and batch size. Scores under plans of equal digest are comparable.

    Each configuration is scored with its own tokenizer, which belongs to the key of its scores and not to the plan. With a chat template,
    the tokenizer writes the prompts themselves, so that it belongs to the plan too.

    Attributes:
        items: Items by task, in the order of the data.
        kinds: lm-eval's output type by task.
        metrics: Metrics by task.
        tokenizer: Folder of the tokenizer that texts are read with, or the tokenizer itself (`tokenized`).
        tasks_dir: Folder of the local tasks.
        bundled: Tasks that come with lm-eval.
        partial: True if a limit that is not in the suite cuts the items.
        lower: Metrics where lower is better, by task.
        ratios: lm-eval's aggregation by metric for metrics that are no means over items, by task.
        scorer: Scorer of log-likelihoods: the suite's scorer, or its backend.
        facts: Values from which the digest is computed, except the scorer and the tokenizer.
        groups: The suite's groups and their subgroups.
        filters: Names of the filters by task.
    """

    suite: Suite
    items: Mapping[str, tuple[Item, ...]]
    kinds: Mapping[str, str]
    metrics: Mapping[str, tuple[str, ...]]
    tokenizer: Any = field(repr=False)
    tokenizer_digest: str
    tasks_dir: Path
    dtype: str
    batch_size: int
    bundled: frozenset[str] = frozenset()
    partial: bool = False
    lower: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    scorer: str = "hflm"
    facts: Sequence[Any] = field(default=(), repr=False)
    groups: Sequence[TaskGroup] = ()
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """XXH3-128 digest of everything that decides scores."""
        return bytes_digest(json.dumps([*self.facts, *self._template, SCORERS[self.scorer]]).encode())

    @property
    def place(self) -> str:
        """Suite and digest: two suites with equal items have one digest, and scores of their own."""
        return f"{self.suite.suite}-{self.digest}"

    @property
    def _template(self) -> list[str]:
        """Digest of the tokenizer whose chat template writes the prompts, if the suite uses it."""
        return [self.tokenizer_digest] if self.suite.chat_template else []

    @property
    def generates(self) -> bool:
        """True if a task generates text, so that generation settings influence scores."""
        return any(kind == GENERATED for kind in self.kinds.values())

    def by(self, scorer: str) -> ScorePlan:
        """Return this plan with another scorer; scores of the two are not comparable."""
        return replace(self, scorer=scorer)

    def tokenized(self, tokenizer: Any, digest: str) -> ScorePlan:
        """Return this plan for a configuration with another tokenizer, a folder or the tokenizer itself, and its `tokenizer_digest`."""
        return replace(self, tokenizer=tokenizer, tokenizer_digest=digest)

    def part(self, items: Mapping[str, Sequence[Item]]) -> ScorePlan:
        """Return the plan of some of the items, in the order of the data; it has its own digest because its batches differ.

        A task without items is left out: lm-eval builds all items of a task where it is asked for none.
        """
        ids_of = {task: {item.id for item in items[task]} for task in self.suite.tasks}
        selected = {task: tuple(item for item in self.items[task] if item.id in ids) for task, ids in ids_of.items()}
        ids = {task: [item.id for item in task_items] for task, task_items in selected.items()}
        return replace(self, items=selected, facts=[*self.facts, ids]).only({task for task in selected if selected[task]})

    def only(self, tasks: Collection[str]) -> ScorePlan:
        """Return the plan with some of its tasks; with fewer tasks it has no contrasts."""
        suite = self.suite.only(tasks)
        if suite is self.suite:
            return self
        return replace(
            self, suite=suite.model_copy(update={"contrasts": {}}), items={task: self.items[task] for task in suite.tasks}
        )

    def primary(self, task: str) -> str:
        """Return the primary metric of a task."""
        return self.suite.primary.get(task, self.metrics[task][0])

    def record(self) -> PlanRecord:
        """Return the content of plan.json."""
        tasks = {
            t: PlannedTask(
                n=len(self.items[t]),
                kind=self.kinds[t],
                metrics=list(self.metrics[t]),
                primary=self.primary(t),
                lower=list(self.lower.get(t, ())),
                ratios=dict(self.ratios.get(t, {})),
                filters=list(self.filters.get(t, ("none",))),
            )
            for t in self.suite.tasks
        }
        return PlanRecord(
            suite=self.suite.model_dump(mode="json"),
            plan=self.digest,
            tokenizer=next(iter(self._template), None),
            scorer=self.scorer,
            dtype=self.dtype,
            batch_size=self.batch_size,
            partial=self.partial,
            versions=installed(*SCORED_BY),
            tasks=tasks,
            groups=list(self.groups),
            format=PLAN_FORMAT,
        )


@dataclass(frozen=True)
class SuiteTasks:
    """A suite with the documents of its tasks.

    Attributes:
        suite: The suite, with groups replaced by their tasks.
        sources: Documents of its tasks.
        folder: Folder of the local tasks.
        groups: The suite's groups and their subgroups.
    """

    suite: Suite
    sources: Sequence[TaskSource]
    folder: Path
    groups: Sequence[TaskGroup] = ()


def make_plan(tasks: SuiteTasks, tokenizer: Any, *, dtype: str, batch_size: int, limit: int | None = None) -> ScorePlan:
    """Select the items of a suite and build its plan.

    The plan's digest covers task definitions, their code and data, the suite's fields that decide scores (not the analysis settings),
    scorer, dtype, batch size, lm-eval's version, and the tokenizer if the suite uses its chat template.

    Args:
        tasks: The suite and its tasks.
        tokenizer: Folder of the tokenizer, or the tokenizer itself.
        dtype: Name of the dtype of scoring.
        batch_size: Number of requests per batch.
        limit: Maximum number of items per task; a plan that it cuts is partial.

    Raises:
        WorkbenchError: If a task has no items, no usable metric, items without unique ids or without a cluster, or a contrast is invalid.
    """
    suite, sources = tasks.suite, tasks.sources
    _check_generation(suite, sources)
    items, parts, partial = {}, [], False
    for source in sources:
        _check_metric(suite, source)
        all_items = _items(suite, source)
        suite_limit = suite.limit_of(source.name) or len(all_items)
        number = min(suite_limit, len(all_items), limit or len(all_items))
        partial |= number < min(suite_limit, len(all_items))
        items[source.name] = subset(all_items, number)
        parts.append([source.name, source.digest, suite.cluster_of(source.name), number])
    facts = [
        PLAN_FORMAT,
        parts,
        suite.chat_template,
        suite.num_fewshot,
        dtype,
        batch_size,
        installed("lm_eval")["lm_eval"],
        *([suite.system_instruction, sorted(suite.gen_kwargs.items())] if suite.system_instruction or suite.gen_kwargs else []),
    ]
    return ScorePlan(
        suite=suite,
        items=items,
        kinds={s.name: s.kind for s in sources},
        metrics={s.name: s.metrics for s in sources},
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        tasks_dir=tasks.folder,
        dtype=dtype,
        batch_size=batch_size,
        bundled=frozenset(s.name for s in sources if s.bundled),
        partial=partial,
        lower={s.name: tuple(m for m in s.metrics if m in s.lower) for s in sources},
        ratios={s.name: dict(s.ratios) for s in sources},
        scorer=suite.scorer if suite.backend == "hf" else suite.backend,
        facts=facts,
        groups=tasks.groups,
        filters={s.name: s.filters for s in sources},
    )


def subset(items: Sequence[Item], n: int) -> tuple[Item, ...]:
    """Return the n items with the smallest hash of their id, in their original order."""
    chosen = {item.id for item in sorted(items, key=lambda item: (xxhash.xxh3_64_intdigest(item.id.encode()), item.id))[:n]}
    return tuple(item for item in items if item.id in chosen)


def item_ids(docs: Iterable[Mapping[str, object]], task: str, *, bundled: bool = False) -> list[str]:
    """Return the ids of documents; documents without an `id` field get a hash of their content.

    Raises:
        WorkbenchError: If a document of a local task has no field `id`, but another one has.
    """
    docs, ids, counts = list(docs), [], Counter[str]()
    hashed = bundled or all(doc.get("id") is None for doc in docs)
    for number, doc in enumerate(docs, 1):
        if doc.get("id") is not None:
            ids.append(str(doc["id"]))
        elif hashed:
            content_hash = bytes_digest(json.dumps(doc, sort_keys=True, default=str).encode())[:12]
            counts[content_hash] += 1
            ids.append(content_hash if counts[content_hash] == 1 else f"{content_hash}-{counts[content_hash]}")
        else:
            raise WorkbenchError(
                f"task '{task}': item {number} has no field 'id', but others have one",
                "Add a unique id to every item of the data, or remove all of them: items are then known by their content.",
            )
    return ids


def _items(suite: Suite, source: TaskSource) -> list[Item]:
    """Return a task's items with their clusters, after their ids were found to be unique."""
    name, cluster_field = source.name, suite.cluster_of(source.name)
    if not source.docs:
        raise WorkbenchError(f"task '{name}' has no items", "Its test data are empty: generate or restore them.")
    ids = item_ids(source.docs, name, bundled=source.bundled)
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise WorkbenchError(
            f"task '{name}': {len(repeated)} ids occur more than once, the first is '{repeated[0]}'",
            "Items are paired by id: make the ids in the data unique.",
        )
    if cluster_field == "id":
        return [Item(i, i) for i in ids]
    for number, doc in enumerate(source.docs, 1):
        if doc.get(cluster_field) is None:
            raise WorkbenchError(
                f"task '{name}': item {number} has no cluster field '{cluster_field}'. {nearest(cluster_field, doc)}",
                f"Add it to the data, or set `cluster: {{{name}: id}}` in the suite to make each item its own cluster.",
            )
    return [Item(i, str(doc[cluster_field])) for i, doc in zip(ids, source.docs, strict=True)]


def _check_generation(suite: Suite, sources: Sequence[TaskSource]) -> None:
    """Raise WorkbenchError for settings of generation where no task generates text."""
    if suite.gen_kwargs and not any(source.kind == GENERATED for source in sources):
        raise WorkbenchError(
            f"suite '{suite.suite}': gen_kwargs: no task of the suite generates text", "Remove `gen_kwargs`, or add such a task."
        )


def _check_metric(suite: Suite, source: TaskSource) -> None:
    """Raise WorkbenchError for a task without a usable metric, an unknown primary or contrast metric, or a contrast of metrics without scores of items."""
    if not source.metrics:
        raise WorkbenchError(
            f"task '{source.name}' ({source.kind}) has no metric that lm-eval computes for its output type",
            "Give it a `metric_list`, such as acc for choices and exact_match for texts.",
        )
    known = (*source.metrics, MARGIN) if source.kind == "multiple_choice" else source.metrics
    primary = suite.primary.get(source.name, source.metrics[0])
    if primary not in known:
        raise WorkbenchError(f"suite '{suite.suite}': task '{source.name}' has no metric '{primary}'", nearest(primary, known))
    for name, contrast in suite.contrasts.items():
        if source.name not in (contrast.of, contrast.minus):
            continue
        metric = contrast.metric or (primary if source.name == contrast.of else suite.primary.get(contrast.of))
        if metric is not None and metric not in known:
            raise WorkbenchError(
                f"suite '{suite.suite}', contrast '{name}': task '{source.name}' has no metric '{metric}'", nearest(metric, known)
            )
        if metric in source.ratios:
            raise WorkbenchError(
                f"suite '{suite.suite}', contrast '{name}': '{metric}' is computed from all items together, so that an item has no score",
                "Use a metric that is a mean over items: `metric: acc`.",
            )
