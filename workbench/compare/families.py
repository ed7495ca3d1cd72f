"""Which rows are tested together, and what that leaves to each.

Families are declared before any test: the named configurations on the suite's tasks; the bricks, and apart from them base and averages, on the
same tasks, since a control answers another question and must not weaken the answer that was asked for; and the guarded tasks of each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.compare.tables import Table
from workbench.scores.paired import Pair, tested_together
from workbench.scores.signflips import step_down
from workbench.scores.store import Configuration

COMPARED, CONTROLS, GUARDED = "compared", "controls", "guarded"


@dataclass(frozen=True)
class TestedCell:
    """A configuration and a task, with the difference from the baseline."""

    configuration: Configuration
    table: Table
    pair: Pair

    @property
    def control(self) -> bool:
        """Whether nobody asked for this configuration by name."""
        return self.configuration.role != "configuration"

    @property
    def peers(self) -> str:
        """Which configurations are tested together: named ones, bricks, or other controls."""
        role = self.configuration.role
        return role if role in ("configuration", "brick") else "control"

    @property
    def family(self) -> str:
        """What the row is tested with."""
        return GUARDED if self.table.guarded else CONTROLS if self.control else COMPARED


@dataclass(frozen=True)
class Ruling:
    """What a family leaves to one row.

    Attributes:
        p: Adjusted; of a guarded task within the configuration's guarded tasks.
        critical: For the adjusted interval.
        least: The adjusted p of the row if all its changed clusters had changed in one direction.
        interval_p: The p that says whether the adjusted interval excludes 0; `p` if not given.
    """

    p: float
    critical: float
    least: float
    interval_p: float | None = None

    def excludes_zero(self, alpha: float) -> bool:
        """Whether the adjusted interval excludes 0."""
        return (self.p if self.interval_p is None else self.interval_p) <= alpha


def cells_of(tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration]) -> list[TestedCell]:
    """One cell per configuration and task that it was scored on, configuration by configuration."""
    asked = list(others)
    found: dict[tuple[str, int], TestedCell] = {}
    for i, task in enumerate(tasks):
        scored = [c for c in asked if c.digest in task.values]
        pairs = tested_together([task.paired(base.digest, c.digest) for c in scored])
        found.update({(c.digest, i): TestedCell(c, task, pair) for c, pair in zip(scored, pairs, strict=True)})
    return [found[c.digest, i] for c in asked for i in range(len(tasks)) if (c.digest, i) in found]


def rulings(cells: Sequence[TestedCell], alpha: float, correction: str) -> list[Ruling]:
    """Test every family.

    A guarded row is tested twice. That a configuration is worse is a test of that configuration's guarded tasks alone: an alarm must not
    grow quieter because other configurations stand beside it. That it is safe is read off an interval that holds for all guarded rows
    at once: of twenty harmful configurations none may pass by chance.
    """
    if correction == "none":
        return [Ruling(cell.pair.p, cell.pair.changes.critical(alpha), 0.0) for cell in cells]
    found = _tested(cells, alpha, lambda cell: (cell.family, cell.peers))
    guarded = [i for i, cell in enumerate(cells) if cell.table.guarded]
    alone = _tested([cells[i] for i in guarded], alpha, lambda cell: cell.configuration.digest)
    for i, own in zip(guarded, alone, strict=True):
        found[i] = Ruling(own.p, found[i].critical, own.least, found[i].p)
    return found


def _tested(cells: Sequence[TestedCell], alpha: float, family: Callable[[TestedCell], Hashable]) -> list[Ruling]:
    """Return the ruling of every cell within its family."""
    found = [Ruling(1.0, cell.pair.changes.critical(alpha), 1.0) for cell in cells]
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.pair.changes.moved:  # else nothing differs, and nothing is tested
            members[family(cell)].append(i)
    for rows in members.values():
        _family(cells, rows, alpha, found)
    return found


def _family(cells: Sequence[TestedCell], rows: Sequence[int], alpha: float, found: list[Ruling]) -> None:
    """Test one family step by step.

    A rejected row's interval takes the critical value of its own step; all others take that of the first step, which holds for all rows at
    once, so that "equivalent" and "safe" are never claimed at a level that other rows' rejections have relaxed. The value lies between
    Student's t at alpha and at alpha / rows (Bonferroni): where few items change, sign flips of no difference say little about larger ones.
    """
    tasks: dict[int, list[int]] = defaultdict(list)
    for i in rows:
        tasks[id(cells[i].table)].append(i)
    changes = {i: cells[i].pair.changes for i in rows}
    given = [
        (np.stack([changes[i].sums for i in task], 1), np.array([changes[i].scale for i in task])) for task in tasks.values()
    ]
    steps = step_down(given, alpha)
    for task, of_task in zip(tasks.values(), steps, strict=True):
        for i, step in zip(task, of_task, strict=True):
            critical = max(step.critical, changes[i].critical(alpha))
            found[i] = Ruling(max(step.p, cells[i].pair.p), min(critical, changes[i].critical(alpha / len(rows))), step.least)
