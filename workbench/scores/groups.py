"""Groups of tasks as lm-eval defines them, and scores by suite, configuration, task and group as `eval` and `scores import` print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.results import JsonObject, Measured, Number, OpenJsonObject, absent
from workbench.scores.documents import Scores, Skipped
from workbench.scores.plan import PlanRecord
from workbench.scores.suite import NOT_BY_TASK, Aggregate, Suite, TaskGroup
from workbench.scores.tasks import TaskFile, group_files, metric_name


class MetricScore(JsonObject):
    """A configuration's score by one metric, with its 95 % interval."""

    value: Measured
    """Score in the metric's units; a share from 0 to 1 for accuracies."""
    low: Measured
    """Lower end of the interval; null if it is infinite."""
    high: Measured
    """Upper end of the interval."""


class TaskScore(OpenJsonObject):
    """Scores on one task: `n`, and one further field for each metric, named after the metric."""

    __pydantic_extra__: dict[str, MetricScore]

    n: int
    """Number of items."""


class ConfigurationScores(JsonObject):
    """The scores of one configuration."""

    name: str
    """Name of the configuration."""
    digest: str
    """Identity of the configuration: its weights, generation settings and tokenizer."""
    weights: str
    """Digest of the configuration's weights."""
    tasks: dict[str, TaskScore]
    """Task -> scores."""
    groups: list[GroupScore] | None = absent()
    """Aggregates over groups of tasks, if the suite lists a group."""


class SuiteScores(JsonObject):
    """Scores on one suite. `eval` prints a list of these documents if there are several suites."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan: tasks, items, prompts, scorer, dtype and batch size. Equal plans give comparable scores."""
    configurations: list[ConfigurationScores]
    """Scored configurations, controls first."""
    left_out: list[Skipped] | None = absent()
    """Configurations that were skipped, if there are any. The exit code is then 1."""
    warnings: list[str] = []
    """Warnings of the command."""


def by_suite(
    scores: Sequence[Scores], groups: Mapping[tuple[str, str], list[GroupScore]], left_out: list[Skipped] | None
) -> SuiteScores | list[SuiteScores]:
    """Return what `eval` prints: the scores on one suite, or a list of several.

    Args:
        scores: Scores of configurations.
        groups: (suite, configuration) -> aggregates over groups of tasks. Suites that differ in their analysis alone have one plan.
        left_out: Configurations that were skipped.
    """
    found: dict[str, SuiteScores] = {}
    for s in scores:
        one = found.setdefault(s.suite, SuiteScores(suite=s.suite, plan=s.plan, configurations=[], left_out=left_out))
        tasks = {
            task: TaskScore(
                n=about.n,
                **{name: MetricScore(value=m.value, low=m.low, high=m.high) for name, m in about.metrics.items()},
            )
            for task, about in s.tasks.items()
        }
        c = s.configuration
        own = groups.get((s.suite, c.name)) or None
        one.configurations.append(
            ConfigurationScores(name=c.name, digest=c.digest, weights=c.of_weights, tasks=tasks, groups=own)
        )
    return found[scores[0].suite] if len(found) == 1 else list(found.values())


class ImportedScores(JsonObject):
    """A configuration imported from lm-eval's sample files."""

    suite: str
    """Suite that the scores are stored under."""
    plan: str
    """Digest of the plan; equal for runs on the same documents and prompts."""
    name: str
    """Name of the configuration."""
    digest: str
    """Digest of its name and numbers."""
    new: bool
    """False if the store already had the same numbers under this name."""
    tasks: dict[str, int]
    """Task -> number of items."""
    warnings: list[str]
    """What was left out of the files, or differs between them."""

    @classmethod
    def by(cls, scores: Scores, new: bool, warnings: Sequence[str]) -> ImportedScores:
        """Return the entry of imported scores."""
        return cls(
            suite=scores.suite,
            plan=scores.plan,
            name=scores.configuration.name,
            digest=scores.configuration.digest,
            new=new,
            tasks={task: about.n for task, about in scores.tasks.items()},
            warnings=list(warnings),
        )


def local_groups(tasks_dir: Path, index: Mapping[str, TaskFile]) -> dict[str, list[TaskGroup]]:
    """Return each group of a folder of task files, followed by its subgroups.

    Raises:
        WorkbenchError: If a group lists an unknown task, contains itself, or changes a task's settings.
    """
    files = group_files(tasks_dir)
    tags: dict[str, list[str]] = {}
    for name, file in index.items():
        tag_field = file.config.get("tag")
        for tag in tag_field if isinstance(tag_field, list) else [tag_field] if isinstance(tag_field, str) else []:
            tags.setdefault(tag, []).append(name)

    def group(name: str, parents: tuple[str, ...]) -> list[TaskGroup]:
        path, config = files[name]
        if name in parents:
            raise WorkbenchError(f"{path}: group '{name}' contains itself", "Remove the cycle of groups.")
        tasks: list[str] = []
        subgroups: list[TaskGroup] = []
        members = config.get("task") or []
        for item in members if isinstance(members, list) else [members]:
            child = item if isinstance(item, str) else item.get("task") or item.get("group") if isinstance(item, dict) else None
            if not isinstance(child, str) or (isinstance(item, dict) and len(item) > 1):
                raise WorkbenchError(
                    f"{path}: group '{name}': expected names of tasks and groups, found {str(item)[:80]}",
                    "Put a task with other settings into its own file and list its name here.",
                )
            if child in files:
                child_groups = group(child, (*parents, name))
                subgroups += child_groups
                tasks += child_groups[0].tasks
            elif child in index:
                tasks.append(child)
            elif child in tags:
                tasks += tags[child]
            else:
                raise WorkbenchError(f"{path}: group '{name}': unknown task '{child}'", nearest(child, [*index, *files, *tags]))
        alias = config.get("group_alias")
        this = TaskGroup(
            name=name,
            alias=alias if isinstance(alias, str) else name,
            tasks=tuple(dict.fromkeys(tasks)),
            aggregates=tuple(_aggregates(config, path, name)),
        )
        return [this, *subgroups]

    return {name: group(name, ()) for name in files}


def _aggregates(config: Mapping[str, Any], path: Path, name: str) -> Iterable[Aggregate]:
    """Yield the entries of a group's `aggregate_metric_list`."""
    entries = config.get("aggregate_metric_list") or []
    for entry in entries if isinstance(entries, list) else [entries]:
        metric = entry.get("metric") if isinstance(entry, dict) else None
        filters = entry.get("filter_list") if isinstance(entry, dict) else None
        listed = isinstance(filters, list) and all(isinstance(f, str) for f in filters)
        if not isinstance(metric, str) or not (filters is None or isinstance(filters, str) or listed):
            raise WorkbenchError(
                f"{path}: group '{name}': aggregate_metric_list: expected {{metric:, filter_list:, weight_by_size:}}, "
                f"found {str(entry)[:80]}",
                None,
            )
        if entry.get("aggregation", "mean") != "mean":
            raise WorkbenchError(f"{path}: group '{name}': aggregation {entry['aggregation']}: lm-eval supports only mean", None)
        chosen = None if filters is None else (filters,) if isinstance(filters, str) else tuple(filters)
        yield Aggregate(metric=metric, filters=chosen, weighted=bool(entry.get("weight_by_size", True)))


def expanded(suite: Suite, groups: Mapping[str, Sequence[TaskGroup]]) -> Suite:
    """Return the suite with each group replaced by its tasks; a group's settings apply to its tasks that have no own setting."""
    if not any(name in groups for name in suite.tasks):
        return suite
    leaves = {name: groups[name][0].tasks if name in groups else (name,) for name in suite.tasks}
    fields = suite.model_dump(exclude_unset=True)
    for key, value in fields.items():
        if isinstance(value, dict) and key not in NOT_BY_TASK:
            spread = {leaf: v for name, v in value.items() if name in groups and name in leaves for leaf in leaves[name]}
            fields[key] = {**spread, **{name: v for name, v in value.items() if name not in spread and name not in groups}}
    return Suite.model_validate({**fields, "tasks": tuple(dict.fromkeys(leaf for tasks in leaves.values() for leaf in tasks))})


class GroupScore(JsonObject):
    """The mean of a metric over the tasks of a group, as lm-eval aggregates it."""

    group: str
    """Name of the group."""
    alias: str
    """Name of the group in tables."""
    metric: str
    """Metric of the tasks."""
    filter: str
    """lm-eval's filter of the responses; "none" for responses as they are."""
    value: Number
    """Mean of the metric."""
    weighted: bool
    """Whether tasks are weighted by their number of items."""
    tasks: int
    """Number of tasks that have the metric."""
    n: int
    """Number of items of these tasks."""


def aggregated(record: PlanRecord, scores: Scores) -> list[GroupScore]:
    """Return the groups' aggregates of one configuration: weighted means of the tasks' metrics, as lm-eval computes them.

    Tasks without the metric are ignored.

    Args:
        record: Content of plan.json.
        scores: Scores of a configuration under that plan.
    """
    aggregates = []
    for group in record.groups:
        filters = {task: record.tasks[task].filters for task in group.tasks}
        for entry in group.aggregates:
            for filter_name in entry.filters or sorted({f for names in filters.values() for f in names}):
                parts = [
                    (scores.tasks[task].metrics[name].value, scores.tasks[task].n)
                    for task in group.tasks
                    if filter_name in filters[task]
                    and (name := metric_name(entry.metric, filter_name, filters[task])) in scores.tasks[task].metrics
                ]
                if parts:
                    weights = [n if entry.weighted else 1 for _, n in parts]
                    value = sum(v * w for (v, _), w in zip(parts, weights, strict=True)) / sum(weights)
                    aggregates.append(
                        GroupScore(
                            group=group.name,
                            alias=group.alias,
                            metric=entry.metric,
                            filter=filter_name,
                            value=value,
                            weighted=entry.weighted,
                            tasks=len(parts),
                            n=sum(n for _, n in parts),
                        )
                    )
    return aggregates
