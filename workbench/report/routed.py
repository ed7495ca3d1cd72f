"""The report's part on routed configurations: who answered, and whether to merge or to route."""

from __future__ import annotations

from workbench.compare.comparison import Comparison
from workbench.compare.routing import Share, advice
from workbench.report.numbers import PERCENT

HEADS = ("Configuration", "Task", "Right", "n", "Own brick, %", "Base, %", "Other bricks, %", "Answered by")
"""Heads of the table of answers."""


def advised(view: Comparison) -> list[str]:
    """Return a sentence for each routed configuration: merge or route, and why."""
    sentences = []
    for row in view.routing.beside if view.routing else ():
        own = view.configuration(row.configuration)
        sentences.append(advice(row, own.kept_mean.value if own and own.kept_mean else None))
    return sentences


def answered(view: Comparison) -> list[list[str | Share]]:
    """Return the rows of the table of answers: configuration, task, n, shares of own brick, base and other bricks, and who answered."""
    rows: list[list[str | Share]] = []
    for task in view.routing.tasks if view.routing else ():
        named = ", ".join(f"{name} {count}" for name, count in list(task.answered_by.items())[:4])
        more = len(task.answered_by) - 4
        shares = [task.own if task.owner else "\N{EN DASH}", task.base, task.other]
        cells = [task.configuration, task.task, task.owner or "base", str(task.n), *shares]
        rows.append([*cells, named + (f" and {more} more" if more > 0 else "")])
    return rows


def shown(cell: str | Share) -> str:
    """Return a cell of the table of answers as text: a share in percent with its interval."""
    return cell if isinstance(cell, str) else f"{PERCENT.score(cell.value)} {PERCENT.levels(cell.low, cell.high)}"
