"""Stored scores brought together for a comparison: one table a task, all configurations on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from workbench.errors import WorkbenchError, nearest
from workbench.scores import DESIGN_ORDER, Configuration, Row, Scores, Store
from workbench.statistics import Floats, codes, resampled_means
from workbench.suites import Suite


@dataclass(frozen=True)
class Table:
    """A task's scores of all configurations: `values[digest]` in the order of `items`."""

    name: str
    metric: str
    suite: Suite
    plan: str
    items: Sequence[Row]
    cluster: NDArray[np.intp]
    values: Mapping[str, Floats]
    rows: Mapping[str, Sequence[Row]]

    @property
    def chance(self) -> float:
        return self.suite.chance.get(self.name, 0.0)

    @property
    def skill(self) -> bool:
        return self.suite.role_of(self.name) == "skill"

    def corrected(self, score: Any) -> Any:
        """(score - chance) / (1 - chance)."""
        return (score - self.chance) / (1 - self.chance)

    @cached_property
    def resampled(self) -> dict[str, Floats]:
        """Chance-corrected means under resampled clusters, the same draws for every configuration."""
        seed = xxhash.xxh3_64_intdigest(f"{self.plan}/{self.name}".encode())
        means = resampled_means(np.stack(list(self.values.values())), self.cluster, seed=seed)
        return dict(zip(self.values, self.corrected(means), strict=True))


def suites_of(store: Store, scores: Sequence[Scores], given: Mapping[str, Suite]) -> dict[str, Suite]:
    """Suites by name. Errors: one suite under two plans."""
    plans: dict[str, str] = {}
    for s in scores:
        if plans.setdefault(s.suite, s.plan) != s.plan:
            raise WorkbenchError(
                f"suite '{s.suite}': '{s.configuration.name}' was scored under plan {s.plan[:12]}, others under plan "
                f"{plans[s.suite][:12]}: tasks, data, tokenizer, limit or settings differ, so the scores are not comparable",
                "Score all of them again with the same suite, limit and batch size.",
            )
    return {s.suite: given.get(s.suite) or Suite.model_validate(store.record(s)["suite"]) for s in scores}


def configurations_of(scores: Sequence[Scores]) -> list[list[Scores]]:
    """Scores of each configuration over all suites, in design order; equal digests are one configuration."""
    found: dict[str, list[Scores]] = {}
    for s in sorted(scores, key=lambda s: DESIGN_ORDER.index(s.configuration.role)):
        same = found.setdefault(s.configuration.digest, [])
        if s.suite not in {other.suite for other in same}:
            same.append(s)
    names: dict[str, str] = {}
    for digest, (s, *_) in found.items():
        if names.setdefault(s.configuration.name, digest) != digest:
            raise WorkbenchError(
                f"two configurations are called '{s.configuration.name}': {names[s.configuration.name][:12]} and {digest[:12]}",
                "Give one of them another name.",
            )
    return list(found.values())


def named(entries: Sequence[Sequence[Scores]], name: str) -> Configuration:
    for entry in entries:
        if name in {n for s in entry for n in s.names}:
            return entry[0].configuration
    raise WorkbenchError(
        f"baseline '{name}' is not among the scored configurations", nearest(name, [e[0].configuration.name for e in entries])
    )


def tables_of(store: Store, scores: Sequence[Scores], suites: Mapping[str, Suite]) -> list[Table]:
    """Read all per-item scores. Errors: rows that do not belong to the plan's items."""
    tasks = []
    for name, suite in suites.items():
        members = list({s.configuration.digest: s for s in scores if s.suite == name}.values())
        items, record = store.items(members[0]), store.record(members[0])
        stored = {s.configuration.digest: store.rows(s) for s in members}
        for task in suite.tasks:
            metric = suite.primary.get(task, record["tasks"][task]["primary"])
            if metric not in record["tasks"][task]["metrics"]:
                raise WorkbenchError(
                    f"suite '{name}': task '{task}' has no metric '{metric}'", nearest(metric, record["tasks"][task]["metrics"])
                )
            ids = [item["id"] for item in items[task]]
            for digest, rows in stored.items():
                if [row["id"] for row in rows.get(task, ())] != ids:
                    raise WorkbenchError(
                        f"{store.folder(name, members[0].plan)}: items of {digest[:12]} on '{task}' differ from the plan's",
                        "The stored rows are damaged: remove the folder and score again.",
                    )
            rows_of = {digest: rows[task] for digest, rows in stored.items()}
            values = {digest: np.array([row["metrics"][metric] for row in rows]) for digest, rows in rows_of.items()}
            tasks.append(
                Table(
                    task, metric, suite, members[0].plan, items[task], codes([i["cluster"] for i in items[task]]), values, rows_of
                )
            )
    return tasks
