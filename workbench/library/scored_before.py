"""Scores of earlier recipes that merged some bricks: the project's own evidence on which recipe works for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.scores.store import Scores, ScoreStore, plan_record, stored_in

MOST = 3
"""Largest number of configurations of a suite that are shown."""


@dataclass(frozen=True)
class ScoredBefore:
    """A stored configuration that was made from the same bricks.

    Attributes:
        suite: The suite that it was scored on.
        name: Its name.
        recipe: Path of its recipe; None for a control.
        value: Mean of the tasks' primary metrics.
        tasks: Number of tasks.
        items: Number of items of all tasks.
        of: Number of such configurations in the suite.
    """

    suite: str
    name: str
    recipe: str | None
    value: float
    tasks: int
    items: int
    of: int


def scored_before(store: ScoreStore, sizes: Mapping[str, int]) -> list[ScoredBefore]:
    """Return the best stored configurations that were made from exactly these bricks, suite by suite.

    A configuration counts if its bricks have the same names and the same sizes on disk. Plans with a limit on items, imported plans and
    metrics of which less is better do not count. Only the newest plan of a suite is read.

    Args:
        store: The score store.
        sizes: Brick -> bytes on disk.

    Raises:
        WorkbenchError: If a stored document is damaged.
    """
    newest: dict[str, tuple[str, list[ScoredBefore]]] = {}
    for path in store.root.glob("*/plan.json"):
        plan = plan_record(path.parent)
        if plan["partial"] or plan.get("imported"):
            continue
        primary = {
            task: about["primary"] for task, about in plan["tasks"].items() if about["primary"] not in about.get("lower", [])
        }
        stored = [
            scores
            for scores in stored_in(path.parent)
            if scores.configuration.bricks == sizes and len(scores.configuration.parents) > 1
        ]
        if not primary or not stored:
            continue
        suite = plan["suite"]["suite"]
        rows = sorted((_row(scores, primary, len(stored)) for scores in stored), key=lambda row: -row.value)
        created = max(scores.created for scores in stored)
        if suite not in newest or newest[suite][0] < created:
            newest[suite] = (created, rows[:MOST])
    return [row for suite in sorted(newest) for row in newest[suite][1]]


def _row(scores: Scores, primary: Mapping[str, str], count: int) -> ScoredBefore:
    values = [scores.tasks[task].metrics[metric].value for task, metric in primary.items()]
    configuration = scores.configuration
    items = sum(scores.tasks[task].n for task in primary)
    return ScoredBefore(
        scores.suite, configuration.name, configuration.recipe, sum(values) / len(values), len(values), items, count
    )
