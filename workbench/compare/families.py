"""Families: rows that are tested together, and the adjusted p and critical value of each row.

Families are declared before any test. They are the named configurations on the tasks that are not guarded; on the same tasks the bricks, and
separately the base and averages; and the guarded tasks of all, because any of them may be recommended. On other tasks, controls are tested
separately because they answer another question and must not lower the power for the named configurations. What a recommendation rests on
besides are families of their own, in `leaders`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from workbench.compare.tables import Table
from workbench.scores.changes import Changes
from workbench.scores.paired import Pair, tested_together
from workbench.scores.signflips import StepDown, step_down
from workbench.scores.store import Configuration
from workbench.scores.unseen import Standing, alone, standings

COMPARED, CONTROLS, GUARDED = "compared", "controls", "guarded"


@dataclass(frozen=True)
class TestedCell:
    """A configuration and a task, with the difference from the baseline, whose digest is `base`."""

    configuration: Configuration
    table: Table
    pair: Pair
    base: str = ""

    @property
    def control(self) -> bool:
        """True if the configuration is a control."""
        return self.configuration.role != "configuration"

    @property
    def peers(self) -> str:
        """Group of configurations that are tested together: "configuration", "brick" or "control"."""
        role = self.configuration.role
        return role if role in ("configuration", "brick") else "control"

    @property
    def family(self) -> str:
        """Name of the family: compared, guarded or controls."""
        return GUARDED if self.table.guarded else CONTROLS if self.control else COMPARED

    @property
    def loses(self) -> bool:
        """True if the configuration scores worse than the baseline."""
        return (self.pair.diff < 0) != self.table.lower

    @cached_property
    def drawn(self) -> Pair:
        """The difference over what was drawn: clusters or items."""
        if not self.table.suite.draws_items(self.table.task):
            return self.pair
        return self.table.paired(self.base, self.configuration.digest, drawn=True)


@dataclass(frozen=True)
class Ruling:
    """The result of a family's test for one row.

    Attributes:
        p: Adjusted p; on guarded tasks, adjusted for the configuration's guarded tasks only.
        critical: Critical value of the adjusted interval.
        first: The same at the first step of the test, which holds for all rows together: "safe" and "equivalent" use it.
        least: Adjusted p that the row would have if all its changed clusters had changed in the same direction.
        standing: The row in its family, with the p of the sign flips alone; None if no cluster changed.
        interval_p: The adjusted interval excludes 0 if this p is at most alpha; default: `p`.
    """

    p: float
    critical: float
    first: float
    least: float
    standing: Standing | None = None
    interval_p: float | None = None

    def withheld(self, alpha: float) -> Standing | None:
        """Return the row's standing if sign flips alone would reject and unseen clusters keep it from that."""
        return self.standing if self.standing and self.standing.tested <= alpha < self.p else None

    def level(self, pair: Pair) -> float:
        """Return the one-sided level at which "safe" and "equivalent" are tested."""
        return pair.changes.level(self.first)

    def excludes_zero(self, alpha: float) -> bool:
        """Return True if the adjusted interval excludes 0."""
        return (self.p if self.interval_p is None else self.interval_p) <= alpha


def measure_of(table: Table) -> Hashable:
    """Return a label that tables share whose differences have the same unit."""
    return table.metric, table.ratio, table.contrast is not None


def excluded(drawn: Pair, ends: tuple[float, float], margin: float, level: float) -> bool:
    """Return True if differences as large as a margin are excluded: by an interval, and where few clusters differ much.

    Args:
        drawn: The difference over what was drawn.
        ends: Adjusted interval of the difference.
        margin: The margin, in the units of the difference.
        level: One-sided level of the interval.
    """
    return -margin < ends[0] and ends[1] < margin and all(drawn.excludes(margin, side, level) for side in (-1, 1))


def skewed(clusters: int) -> str:
    """Return the reason of a difference that sign flips alone would call better or worse."""
    return f"the changes of the {clusters} clusters are too skewed: one unseen cluster that changed the other way could reverse the result"


def cells_of(tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration]) -> list[TestedCell]:
    """Return one cell per configuration and task on which it was scored, ordered by configuration."""
    configurations = list(others)
    cells: dict[tuple[str, int], TestedCell] = {}
    for i, task in enumerate(tasks):
        scored = [c for c in configurations if c.digest in task.values]
        pairs = tested_together([task.paired(base.digest, c.digest) for c in scored])
        cells.update({(c.digest, i): TestedCell(c, task, pair, base.digest) for c, pair in zip(scored, pairs, strict=True)})
    return [cells[c.digest, i] for c in configurations for i in range(len(tasks)) if (c.digest, i) in cells]


def rulings(cells: Sequence[TestedCell], alpha: float, correction: str) -> list[Ruling]:
    """Test all families.

    A guarded row is tested twice. "Worse" comes from a test of this configuration's guarded tasks only, so that other configurations in the
    comparison do not weaken the alarm. "Safe" comes from an interval that holds for all guarded rows together, so that among many harmful
    configurations it is unlikely that any passes by chance.

    Args:
        cells: All rows, as `cells_of` returns them.
        alpha: Error rate of a family.
        correction: "max-t" or "none".

    Returns:
        One ruling per cell, in the same order.
    """
    if correction == "none":
        single = [cell.pair.changes.critical(alpha) for cell in cells]
        moved = [alone(cell.pair.changes) if cell.pair.changes.moved else None for cell in cells]
        return [
            Ruling(standing.p if standing else 1.0, critical, critical, 0.0, standing)
            for standing, critical in zip(moved, single, strict=True)
        ]
    results = _tested(cells, alpha, lambda cell: (cell.family, cell.table.guarded or cell.peers))
    guarded = [i for i, cell in enumerate(cells) if cell.table.guarded]
    apart = _tested([cells[i] for i in guarded], alpha, lambda cell: cell.configuration.digest)
    for i, ruling in zip(guarded, apart, strict=True):
        results[i] = replace(ruling, critical=results[i].first, first=results[i].first, interval_p=results[i].p)
    return results


def _tested(cells: Sequence[TestedCell], alpha: float, family: Callable[[TestedCell], Hashable]) -> list[Ruling]:
    """Return the ruling of every cell within its family."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        members[family(cell)].append(i)
    results: dict[int, Ruling] = {}
    for rows in members.values():
        moved = [i for i in rows if cells[i].pair.changes.moved]
        changes = [cells[i].pair.changes for i in moved]
        tables, measures = ([label(cells[i].table) for i in moved] for label in (id, measure_of))
        # Rows without a change have no part in the test. That they show no loss is a claim of its own for each of them.
        alone = [cells[i].pair.changes.critical(alpha / len(rows)) for i in rows]
        results.update((i, Ruling(1.0, critical, critical, 1.0)) for i, critical in zip(rows, alone, strict=True))
        results.update(zip(moved, ruled(changes, tables, measures, alpha), strict=True))
    return [results[i] for i in range(len(cells))]


def ruled(changes: Sequence[Changes], tasks: Sequence[Hashable], metrics: Sequence[Hashable], alpha: float) -> list[Ruling]:
    """Test one family with the step-down procedure.

    The interval of a rejected row uses the critical value of its own step. All other rows use that of the first step, which holds for all
    rows together, so that "equivalent" and "safe" never depend on a level that other rows' rejections have relaxed. The value is kept between
    Student's t at alpha and at alpha / rows (Bonferroni), because if few items change, the sign flips say little about larger differences.

    Args:
        changes: The rows, in each of which at least one cluster has changed.
        tasks: One label per row; rows with the same label have the same clusters and are flipped together.
        metrics: One label per row; the changes of rows with the same label have the same unit.
        alpha: Error rate of the family.

    Returns:
        One ruling per row, in the same order.
    """
    by_task: dict[Hashable, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        by_task[task].append(i)
    task_sums = [
        (np.stack([changes[i].sums for i in rows], 1), np.array([changes[i].scale for i in rows])) for rows in by_task.values()
    ]
    steps: dict[int, StepDown] = {}
    for rows, of_task in zip(by_task.values(), step_down(task_sums, alpha), strict=True):
        steps.update(zip(rows, of_task, strict=True))
    tested = [max(steps[i].p, row.flipped) for i, row in enumerate(changes)]
    found = standings(changes, tested, [steps[i].single for i in range(len(changes))], metrics, alpha)
    rulings = []
    for i, (row, standing) in enumerate(zip(changes, found, strict=True)):
        least, most = row.critical(alpha), row.critical(alpha / len(changes))
        critical, first = (min(max(value, least), most) for value in (steps[i].critical, steps[i].first))
        p = standing.p if standing.tested <= alpha else standing.tested
        rulings.append(Ruling(p, critical, first, steps[i].least, standing))
    return rulings
