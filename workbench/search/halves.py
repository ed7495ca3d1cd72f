"""Two halves of a search's items: what candidates see, in stages, and what none of them sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import xxhash

from workbench.files import json_digest
from workbench.scores.plan import Item, ScorePlan
from workbench.scores.statistics import FEW_CLUSTERS, effective_clusters
from workbench.search.objective import Objective


@dataclass(frozen=True)
class Stages:
    """The items of a search.

    Attributes:
        search: A list of plans, one a suite, for each stage: the items that it adds.
        test: One plan a suite, of items that no candidate sees.
    """

    search: tuple[tuple[ScorePlan, ...], ...]
    test: tuple[ScorePlan, ...]

    @property
    def key(self) -> str:
        """Digest of all plans."""
        return json_digest([[plan.digest for plan in stage] for stage in (*self.search, self.test)])

    @property
    def items(self) -> dict[str, int]:
        """How many items candidates may see, and how many are kept for the test."""
        return {"search": sum(map(_count, self.search)), "test": _count(self.test)}

    def halves(self, suite: str, task: str) -> dict[str, list[Item]]:
        """Return a task's items by half: "search" and "test"."""
        plans = {"search": [plan for stage in self.search for plan in stage], "test": self.test}
        return {
            half: [item for plan in found if plan.suite.suite == suite for item in plan.items.get(task, ())]
            for half, found in plans.items()
        }

    def counts(self, objective: Objective) -> dict[str, dict[str, int]]:
        """Return items and clusters of an objective's tasks, each by half."""
        found = [self.halves(*key) for key in dict.fromkeys(term.key for term in objective.terms)]
        return {
            "items": {half: sum(len(task[half]) for task in found) for half in ("search", "test")},
            "clusters": {half: sum(len({item.cluster for item in task[half]}) for task in found) for half in ("search", "test")},
        }


def _count(plans: Sequence[ScorePlan]) -> int:
    return sum(len(items) for plan in plans for items in plan.items.values())


def stages_of(plans: Sequence[ScorePlan], share: float, counts: Sequence[int]) -> Stages:
    """Split every task's items, whole clusters together, and the search half into stages.

    Args:
        share: Of the items that go to the test.
        counts: Items of a task after each stage; what is left after the last one is not used.
    """
    halves = [{task: split(items, share) for task, items in plan.items.items()} for plan in plans]
    longest = max(len(seen) for tasks in halves for seen, _ in tasks.values())
    ends = list(dict.fromkeys(min(count, longest) for count in counts))
    stages = []
    for start, end in zip([0, *ends], ends, strict=False):
        parts = [
            plan.part({task: seen[start:end] for task, (seen, _) in tasks.items()})
            for plan, tasks in zip(plans, halves, strict=True)
        ]
        stages.append(tuple(parts))
    test = tuple(plan.part({task: kept for task, (_, kept) in tasks.items()}) for plan, tasks in zip(plans, halves, strict=True))
    return Stages(tuple(stages), test)


def split(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split a task's items into search and test items; no cluster has items in both.

    Items of a cluster resemble each other: where a candidate was chosen on one of them, another one is no independent test. Clusters go to
    the test in the order of a hash of their labels until the test has about `share` of the items. The largest cluster stays in the search
    half, where it cannot outweigh all others of the test. A single cluster is split by items, and a single item goes to the test.

    Args:
        share: Of the items that go to the test.

    Returns:
        Search and test items, each in the order of a hash of their ids, so that a stage has items of many clusters.
    """
    order = _by_hash(items, lambda item: item.id)
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.cluster] = sizes.get(item.cluster, 0) + 1
    if len(sizes) < 2:
        kept = min(max(1, round(share * len(order))), max(len(order) - 1, 1))
        return order[kept:], order[:kept]
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
    """Return what the test of a search will not be able to say, by its clusters; empty where nothing is in the way."""
    users: dict[tuple[str, str], list[str]] = {}
    for objective in objectives:
        for term in objective.terms:
            users.setdefault(term.key, []).append(objective.name)
    found = [_warning(task, stages.halves(suite, task), dict.fromkeys(names)) for (suite, task), names in users.items()]
    return [text for text in found if text]


def _warning(task: str, halves: Mapping[str, Sequence[Item]], objectives: Mapping[str, None]) -> str | None:
    seen, kept = ({item.cluster for item in halves[half]} for half in ("search", "test"))
    clusters = len(seen | kept)
    tests = " and ".join(f"'{name}'" for name in objectives)
    if clusters == 1:
        return (
            f"task '{task}' has one cluster, which is split between search and test: the test of {tests} says \"cannot tell\" whatever the "
            f"search finds, and understates how much search items flatter the winner. Two halves of {FEW_CLUSTERS} clusters take {2 * FEW_CLUSTERS}."
        )
    if len(kept) < FEW_CLUSTERS:
        share = math.ceil(100 * FEW_CLUSTERS / clusters) / 100
        wider = f", or set `test: {share:g}`" if clusters > FEW_CLUSTERS and share < 1 else ""
        return (
            f"task '{task}' has {len(kept)} of its {clusters} clusters in the test half, and below {FEW_CLUSTERS} no verdict is given: the test "
            f'of {tests} says "cannot tell" whatever the search finds. Score more clusters{wider}.'
        )
    sizes = [sum(item.cluster == label for item in halves["test"]) for label in kept]
    worth = effective_clusters(np.array(sizes))
    if worth < FEW_CLUSTERS:
        return (
            f"task '{task}' has {len(kept)} clusters in the test half, of which the largest holds {max(sizes)} of {sum(sizes)} items: they are "
            f"worth {worth:.1f} clusters of equal size, and the test of {tests} finds large differences only."
        )
    return None
