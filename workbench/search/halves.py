"""The two halves of a search's items: search items, which candidates see in stages, and test items, which the search does not use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import xxhash

from workbench.ground.files import json_digest
from workbench.recipe.recipe import Recipe
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS, effective_clusters
from workbench.search.objective import Objective
from workbench.search.result import HalfCounts


@dataclass(frozen=True)
class Stages:
    """The items of a search.

    Attributes:
        search: For each stage, one plan per suite with the items that the stage adds; tasks whose items are used up are left out.
        test: One plan per suite with the test items.
        guard: One plan per suite with the search items of its guarded tasks that no objective has.
    """

    search: tuple[tuple[ScorePlan, ...], ...]
    test: tuple[ScorePlan, ...]
    guard: tuple[ScorePlan, ...] = ()

    @property
    def key(self) -> str:
        """Digest of all plans."""
        guard = [self.guard] if self.guard else []
        return json_digest([[plan.digest for plan in stage] for stage in (*self.search, self.test, *guard)])

    @property
    def items(self) -> HalfCounts:
        """Number of search items and of test items."""
        return HalfCounts(search=sum(map(_count, self.search)), test=_count(self.test))

    def halves(self, suite: str, task: str) -> dict[str, list[Item]]:
        """Return a task's items by half: "search" and "test"."""
        by_half = {"search": [plan for stage in self.search for plan in stage], "test": self.test}
        return {
            half: [item for plan in plans if plan.suite.suite == suite for item in plan.items.get(task, ())]
            for half, plans in by_half.items()
        }

    def counts(self, objective: Objective) -> dict[str, HalfCounts]:
        """Return the numbers of `items` and `clusters` of an objective's tasks."""
        tasks = [self.halves(*key) for key in dict.fromkeys(term.key for term in objective.terms)]
        items = {half: sum(len(task[half]) for task in tasks) for half in ("search", "test")}
        clusters = {half: sum(len({item.cluster for item in task[half]}) for task in tasks) for half in ("search", "test")}
        return {"items": HalfCounts(**items), "clusters": HalfCounts(**clusters)}


def _count(plans: Sequence[ScorePlan]) -> int:
    return sum(len(items) for plan in plans for items in plan.items.values())


def stages_of(plans: Sequence[ScorePlan], share: float, counts: Sequence[int]) -> Stages:
    """Split the items of every task into search and test items by whole clusters, and the search items into stages.

    Args:
        plans: Plans of all suites.
        share: Share of the items that become test items.
        counts: Number of items of a task after each stage; items after the last stage are not used.
    """
    halves = [{task: split(items, share) for task, items in plan.items.items()} for plan in plans]
    longest = max(len(search_items) for tasks in halves for search_items, _ in tasks.values())
    ends = list(dict.fromkeys(min(count, longest) for count in counts))
    stages = []
    for start, end in zip([0, *ends], ends, strict=False):
        parts = [
            plan.part({task: search_items[start:end] for task, (search_items, _) in tasks.items()})
            for plan, tasks in zip(plans, halves, strict=True)
        ]
        stages.append(tuple(part for part in parts if part.suite.tasks))
    test = tuple(
        plan.part({task: test_items for task, (_, test_items) in tasks.items()})
        for plan, tasks in zip(plans, halves, strict=True)
    )
    return Stages(tuple(stages), test)


def guard_of(plans: Sequence[ScorePlan], share: float, objectives: Sequence[Objective]) -> tuple[ScorePlan, ...]:
    """Return the plans of the search items of guarded tasks that no objective has; `share` is that of the test items."""
    scored = {term.key for objective in objectives for term in objective.terms}
    parts = []
    for plan in plans:
        items = {task: split(items, share)[0] for task, items in plan.items.items()}
        part = plan.part(items)
        parts.append(
            part.only({task for task in part.suite.tasks if plan.suite.guards(task) and (plan.suite.suite, task) not in scored})
        )
    return tuple(part for part in parts if part.suite.tasks)


def check_halves(recipe: Recipe, stages: Stages, objectives: Sequence[Objective]) -> None:
    """Raise WorkbenchError if a task of an objective has too few items for two halves."""
    for key in dict.fromkeys(term.key for objective in objectives for term in objective.terms):
        halves = stages.halves(*key)
        if not all(halves.values()):
            number = sum(map(len, halves.values()))
            raise recipe.error(
                ("search", "objective"),
                f"task '{key[1]}' has {number} item{'' if number == 1 else 's'}, but a search needs at least one search item and one test item",
                "Score more items, or choose another objective.",
            )


def split(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split a task's items into search and test items; no cluster has items in both.

    Items of a cluster resemble each other, so that an item is not an independent test of a candidate that was chosen on another item of its
    cluster. Clusters become test clusters in the order of a hash of their labels until the test has about `share` of the items. The largest
    cluster stays in the search half, so that it does not dominate the test. A single cluster is split by items, and a single item goes to the
    test.

    Args:
        items: Items of the task.
        share: Share of the items that become test items.

    Returns:
        Search and test items, each in the order of a hash of their ids, so that each stage has items of many clusters.
    """
    order = _by_hash(items, lambda item: item.id)
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.cluster] = sizes.get(item.cluster, 0) + 1
    if len(sizes) < 2:
        test_count = min(max(1, round(share * len(order))), max(len(order) - 1, 1))
        return order[test_count:], order[:test_count]
    labels = _by_hash(sizes, lambda label: label)
    largest = max(reversed(labels), key=sizes.__getitem__)
    labels.remove(largest)
    ends = list(accumulate(sizes[label] for label in labels))
    nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - share * len(items)))
    test = set(labels[: nearest + 1])
    return [item for item in order if item.cluster not in test], [item for item in order if item.cluster in test]


def _by_hash(values: Any, name: Callable[[Any], str]) -> list[Any]:
    return sorted(values, key=lambda value: (xxhash.xxh3_64_intdigest(f"search {name(value)}".encode()), name(value)))


def warnings_of(stages: Stages, objectives: Sequence[Objective]) -> list[str]:
    """Return warnings on tasks whose clusters are too few or too unequal for the test of a search."""
    users: dict[tuple[str, str], list[str]] = {}
    for objective in objectives:
        for term in objective.terms:
            users.setdefault(term.key, []).append(objective.name)
    texts = [_warning(task, stages.halves(suite, task), dict.fromkeys(names)) for (suite, task), names in users.items()]
    return [text for text in texts if text]


def _warning(task: str, halves: Mapping[str, Sequence[Item]], objectives: Mapping[str, None]) -> str | None:
    """Return the warning on one task, or None if its test half has enough clusters."""
    search_clusters, test_clusters = ({item.cluster for item in halves[half]} for half in ("search", "test"))
    clusters = len(search_clusters | test_clusters)
    tests = " and ".join(f"'{name}'" for name in objectives)
    if clusters == 1:
        return (
            f"task '{task}' has only one cluster, which is split between search and test: the verdict on {tests} is always \"cannot tell\", and "
            f"the optimism of the search items is underestimated. {FEW_CLUSTERS} clusters in each half need {2 * FEW_CLUSTERS} clusters."
        )
    if len(test_clusters) < FEW_CLUSTERS:
        share = math.ceil(100 * FEW_CLUSTERS / clusters) / 100
        wider = f", or set `test: {share:g}`" if clusters > FEW_CLUSTERS and share < 1 else ""
        return (
            f"task '{task}' has {len(test_clusters)} of its {clusters} clusters in the test half, but a verdict needs {FEW_CLUSTERS}: the verdict on "
            f'{tests} is always "cannot tell". Score more clusters{wider}.'
        )
    sizes = [sum(item.cluster == label for item in halves["test"]) for label in test_clusters]
    effective = effective_clusters(np.array(sizes))
    if effective < FEW_CLUSTERS:
        return (
            f"task '{task}' has {len(test_clusters)} clusters in the test half, and the largest has {max(sizes)} of {sum(sizes)} items: they are worth "
            f"only {effective:.1f} clusters of equal size, and the test of {tests} detects only large differences."
        )
    return None
