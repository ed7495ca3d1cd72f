"""Differences from the baseline, one row per configuration and task, and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from workbench.compare.families import Ruling, TestedCell, cells_of, rulings
from workbench.compare.tables import Table
from workbench.scores.paired import Pair, paired
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS
from workbench.scores.store import Configuration
from workbench.scores.suite import MARGIN

Verdict = Literal["better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed"]


@dataclass(frozen=True)
class Companion:
    """The difference of another metric of the same items, outside the family: it decides no verdict. Plain 95 % interval."""

    metric: str
    unit: str
    value: float
    baseline_value: float
    diff: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Difference:
    """One configuration against the baseline on one task's primary metric, or on a contrast of two tasks.

    Attributes:
        value, baseline_value, diff: In the metric's own units; `diff` is configuration - baseline also where lower is better.
        low, high: Plain 95 % interval of the difference.
        low_adj, high_adj: At the critical value that the family leaves to this row.
        p_adj: The family's; of a guarded task that of the configuration's guarded tasks alone.
        mde: Difference that would be found with 80 % power at that level; None if no spread was seen.
        needs: Items, about, to tell a difference as large as this one, or min_effect if that is larger; of a guarded task, to show that
            a loss as large as this one is safe. With "cannot tell" and "not shown safe" only.
        verdict: better | worse | equivalent | cannot tell | no item changed; of a guarded task safe | worse | not shown safe | no item changed.
        reason: Why it cannot tell.
        wins, losses: Items that got better, worse.
        lower: Lower is better.
        ratio: A ratio of sums over items, not a mean.
        family: compared | guarded | controls.
        tolerance: Of a guarded task: the largest loss that is safe, in the metric's units.
        companion: The lead of the gold choice, for multiple-choice tasks.
    """

    configuration: str
    role: str
    task: str
    metric: str
    value: float
    baseline_value: float
    diff: float
    low: float
    high: float
    low_adj: float
    high_adj: float
    p: float
    p_adj: float
    n: int
    clusters: int
    mde: float | None
    needs: int | None
    verdict: Verdict
    reason: str | None
    wins: int
    losses: int
    lower: bool = False
    ratio: bool = False
    family: str = "compared"
    tolerance: float | None = None
    companion: Companion | None = None


def differences(
    tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration], alpha: float, correction: str = "max-t"
) -> list[Difference]:
    """One row per configuration and task; each family is corrected by itself."""
    cells = cells_of(tasks, base, others)
    return [
        replace(
            _difference(cell, ruling, cell.table.value(base.digest), alpha),
            companion=_companion(cell.table, base.digest, cell.configuration.digest),
        )
        for cell, ruling in zip(cells, rulings(cells, alpha, correction), strict=True)
    ]


def unchanged(tasks: Sequence[Table], base: Configuration, name: str) -> Iterator[Difference]:
    """Rows of a configuration, `name`, whose weights are the baseline's: nothing is tested."""
    again = replace(base, name=name, role="configuration")
    for t in tasks:
        cell = TestedCell(again, t, t.paired(base.digest, base.digest))
        yield _difference(cell, Ruling(1.0, 0.0, 1.0), t.value(base.digest), 0.05)


def _difference(cell: TestedCell, ruling: Ruling, start: float, alpha: float) -> Difference:
    """The row with its verdict."""
    task, pair = cell.table, cell.pair
    low, high = pair.interval(0.05)
    low_adj, high_adj = pair.within(ruling.critical, ruling.excludes_zero(alpha))
    gained, lost = (pair.losses, pair.wins) if task.lower else (pair.wins, pair.losses)
    row = Difference(
        configuration=cell.configuration.name,
        role=cell.configuration.role,
        task=task.name,
        metric=task.metric,
        value=start + pair.diff,
        baseline_value=start,
        diff=pair.diff,
        low=low,
        high=high,
        low_adj=low_adj,
        high_adj=high_adj,
        p=pair.p,
        p_adj=ruling.p,
        n=pair.n,
        clusters=pair.clusters,
        mde=pair.mde(ruling.critical),
        needs=None,
        verdict="cannot tell",
        reason=None,
        wins=gained,
        losses=lost,
        lower=task.lower,
        ratio=task.ratio is not None,
        family=cell.family,
        tolerance=task.tolerance if task.guarded else None,
    )
    if pair.unchanged:
        return replace(row, verdict="no item changed")
    judge = _guarded if task.guarded else _compared
    return judge(row, pair, ruling, task, alpha)


def _compared(row: Difference, pair: Pair, ruling: Ruling, task: Table, alpha: float) -> Difference:
    """Better and worse: the family's test. Equivalent: the adjusted interval lies within +-min_effect."""
    margin = task.min_effect
    if pair.clusters < FEW_CLUSTERS:
        return replace(row, **_too_few(pair))
    if ruling.p <= alpha:
        return replace(row, verdict="better" if (pair.diff > 0) != task.lower else "worse")
    if margin is not None and -margin < row.low_adj and row.high_adj < margin:
        return replace(row, verdict="equivalent")
    if ruling.least > alpha and not _few_changed(pair):
        return replace(row, reason=_no_verdict_can_fall(pair, ruling))
    needs = pair.needs(max(abs(pair.diff), margin or 0.0), ruling.critical)
    if margin is None:
        return replace(row, reason="the interval holds 0, and the suite gives no min_effect for this metric", needs=needs)
    return replace(row, reason="the interval holds 0 and more than the smallest effect of interest", needs=needs)


def _guarded(row: Difference, pair: Pair, ruling: Ruling, task: Table, alpha: float) -> Difference:
    """Safe: at most a loss of `tolerance` is left in the adjusted interval. Worse: the configuration's own test finds a loss."""
    if pair.clusters < FEW_CLUSTERS:
        return replace(row, verdict="not shown safe", **_too_few(pair))
    worst = row.high_adj if task.lower else -row.low_adj  # the largest loss that is left
    if worst < (task.tolerance or 0.0):
        return replace(row, verdict="safe")
    if ruling.p <= alpha and (pair.diff < 0) != task.lower:
        return replace(row, verdict="worse")
    if task.tolerance is None:
        return replace(row, verdict="not shown safe", reason="the suite gives no tolerance for this metric")
    left = task.tolerance - max(row.diff if task.lower else -row.diff, 0.0)  # beyond the loss that was seen
    needs = pair.needs(left, ruling.critical) if left > 0 else None
    return replace(row, verdict="not shown safe", reason="the interval holds losses beyond the tolerance", needs=needs)


def _too_few(pair: Pair) -> dict[str, Any]:
    return {
        "reason": f"too few clusters: {pair.clusters}, at least {FEW_CLUSTERS} needed",
        "needs": pair.needs(abs(pair.diff)) or math.ceil(pair.n * MANY_CLUSTERS / pair.clusters),
    }


def _few_changed(pair: Pair) -> bool:
    """Return whether it is the number of changes that leaves nothing to find: more items help then."""
    return 2 * pair.changes.moved < pair.clusters


def _no_verdict_can_fall(pair: Pair, ruling: Ruling) -> str:
    return (
        f"no verdict can fall: with all {pair.clusters} clusters on one side p is still {ruling.least:.2g}; "
        "more clusters or fewer rows are needed"
    )


def _companion(task: Table, base: str, digest: str) -> Companion | None:
    if task.metric == MARGIN or not task.margins:
        return None
    pair, start = paired(task.margins[base], task.margins[digest], task.cluster.tolist()), float(task.margins[base].mean())
    return Companion(MARGIN, "nats", start + pair.diff, start, pair.diff, *pair.interval(0.05), pair.p)


def interference(tasks: Sequence[Table], bricks: Sequence[Configuration], rows: Sequence[Difference]) -> dict[str, Any]:
    """Each brick alone minus the base, on every task."""
    cells = {(row.configuration, row.task): row for row in rows}
    table = [[cells.get((brick.name, task.name)) for task in tasks] for brick in bricks]

    def part(name: str) -> list[list[Any]]:
        return [[getattr(cell, name) if cell else None for cell in line] for line in table]

    return {
        "bricks": [b.name for b in bricks],
        "tasks": [t.name for t in tasks],
        "diff": part("diff"),
        "low": part("low_adj"),
        "high": part("high_adj"),
        "verdict": part("verdict"),
    }
