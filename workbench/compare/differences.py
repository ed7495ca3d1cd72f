"""Differences from the baseline and their verdicts, one row per configuration and task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from workbench.compare.families import Ruling, TestedCell, cells_of, excluded, rulings, skewed
from workbench.compare.tables import Table
from workbench.scores.paired import Pair, paired
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS
from workbench.scores.store import Configuration
from workbench.scores.suite import MARGIN

Verdict = Literal["better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed"]


@dataclass(frozen=True)
class Companion:
    """The difference of a second metric on the same items, with an unadjusted 95 % interval; it does not decide any verdict."""

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
        value, baseline_value, diff: Scores and their difference in the metric's units; `diff` is always configuration - baseline.
        low, high: Unadjusted 95 % interval of the difference.
        low_adj, high_adj: Interval at the critical value that the family leaves to this row; it excludes 0 if the verdict is better or worse.
        p_adj: p value adjusted for the family; on guarded tasks, for the configuration's guarded tasks only.
        mde: Difference that would be detected with 80 % power at the adjusted level; None if the differences have no spread.
        needs: Approximate number of items that would detect a difference as large as `diff`, or min_effect if that is larger; on guarded
            tasks, that would show that a loss as large as `diff` is safe. Only with "cannot tell" and "not shown safe".
        verdict: better | worse | equivalent | cannot tell | no item changed; on guarded tasks safe | worse | not shown safe | no item changed.
        reason: Reason of the verdicts "cannot tell" and "not shown safe".
        wins, losses: Number of items that got better, worse.
        lower: Lower is better.
        ratio: The metric is computed from all items together, not a mean of scores of items.
        family: compared | guarded | controls.
        tolerance: Largest loss on a guarded task that counts as safe, in the metric's units.
        companion: Margin of the gold choice, for multiple-choice tasks.
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
    tasks: Sequence[Table],
    base: Configuration,
    others: Iterable[Configuration],
    alpha: float,
    correction: str = "max-t",
    looked: Sequence[Configuration] = (),
) -> list[Difference]:
    """Return one row per configuration and task; each family is corrected separately.

    Args:
        tasks: Tables of the tasks.
        base: The baseline.
        others: The configurations that get rows.
        alpha: Error rate of a family.
        correction: "max-t" or "none".
        looked: Configurations that are tested in the same families and get no rows. They do not count for the verdict "worse".
    """
    cells, hidden = cells_of(tasks, base, [*others, *looked]), {c.digest for c in looked}
    found = rulings(cells, alpha, correction)
    if hidden:  # nobody names the worst of twenty to make it look worse: what was looked at must not weaken an alarm
        named = [i for i, cell in enumerate(cells) if cell.configuration.digest not in hidden]
        for i, alone in zip(named, rulings([cells[i] for i in named], alpha, correction), strict=True):
            if cells[i].loses:
                whole = found[i]
                found[i] = replace(
                    whole,
                    p=alone.p,
                    least=alone.least,
                    flipped=alone.flipped,
                    interval_p=whole.p if whole.interval_p is None else whole.interval_p,
                )
    return [
        replace(
            _difference(cell, ruling, cell.table.value(base.digest), alpha),
            companion=_companion(cell.table, base.digest, cell.configuration.digest),
        )
        for cell, ruling in zip(cells, found, strict=True)
        if cell.configuration.digest not in hidden
    ]


def unchanged(tasks: Sequence[Table], base: Configuration, name: str) -> Iterator[Difference]:
    """Yield the rows of a configuration with the baseline's weights, which needs no test."""
    again = replace(base, name=name, role="configuration")
    for t in tasks:
        cell = TestedCell(again, t, t.paired(base.digest, base.digest), base.digest)
        row = _difference(cell, Ruling(1.0, 0.0, 0.0, 1.0), t.value(base.digest), 0.05)
        yield replace(row, verdict="no item changed", reason=None, needs=None)


def _difference(cell: TestedCell, ruling: Ruling, start: float, alpha: float) -> Difference:
    """Return the row of a configuration and a task with its verdict."""
    task, pair = cell.table, cell.pair
    low, high = pair.interval(0.05)
    alarm = task.guarded and cell.loses and ruling.p <= alpha
    low_adj, high_adj = pair.within(ruling.critical, alarm or ruling.excludes_zero(alpha))
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
    judge = _guarded if task.guarded else _compared
    return judge(row, cell, ruling, alpha)


def _compared(row: Difference, cell: TestedCell, ruling: Ruling, alpha: float) -> Difference:
    """Set the verdict of a row: better and worse by the family's test, equivalent if a difference as large as min_effect is excluded."""
    task, pair, margin = cell.table, cell.pair, cell.table.min_effect
    if pair.unchanged:
        return replace(row, verdict="no item changed")
    if pair.clusters < FEW_CLUSTERS:
        return replace(row, **_too_few(pair))
    if ruling.p <= alpha:
        return replace(row, verdict="better" if (pair.diff > 0) != task.lower else "worse")
    if margin is not None and excluded(cell.drawn, (row.low_adj, row.high_adj), margin, ruling.level(pair)):
        return replace(row, verdict="equivalent")
    if ruling.flipped <= alpha:
        return replace(row, reason=skewed(pair.clusters), needs=pair.needs_symmetry(alpha))
    if ruling.least > alpha and not _few_changed(pair):
        return replace(row, reason=_never_significant(pair, ruling))
    if margin is not None and -margin < row.low_adj and row.high_adj < margin:
        both = [cell.drawn.needs_to_exclude(margin, side, ruling.level(pair)) for side in (-1, 1)]
        return replace(row, reason=_rare("difference", cell), needs=None if None in both else max(n or 0 for n in both))
    needs = pair.needs(max(abs(pair.diff), margin or 0.0), ruling.critical)
    if margin is None:
        return replace(
            row, reason="the adjusted interval includes 0, and the suite gives no min_effect for this metric", needs=needs
        )
    reason = "the adjusted interval includes 0 and a difference as large as the smallest effect of interest"
    return replace(row, reason=reason, needs=needs)


def _guarded(row: Difference, cell: TestedCell, ruling: Ruling, alpha: float) -> Difference:
    """Set the verdict of a guarded row: safe if a loss as large as the tolerance is excluded, worse by the test of its guarded tasks."""
    task, pair, tolerance = cell.table, cell.pair, cell.table.tolerance
    if pair.clusters < FEW_CLUSTERS:
        return replace(row, verdict="not shown safe", **_too_few(pair))
    losing = 1 if task.lower else -1
    worst = row.high_adj if task.lower else -row.low_adj  # the largest loss in the adjusted interval
    if tolerance is not None and worst < tolerance and cell.drawn.excludes(tolerance, losing, ruling.level(pair)):
        return replace(row, verdict="safe")
    if cell.loses and ruling.p <= alpha:
        return replace(row, verdict="worse")
    if tolerance is None:
        return replace(row, verdict="not shown safe", reason="the suite gives no tolerance for this metric")
    if worst < tolerance:
        needs = cell.drawn.needs_to_exclude(tolerance, losing, ruling.level(pair))
        return replace(row, verdict="not shown safe", reason=_rare("loss", cell), needs=needs)
    room = tolerance - max(losing * row.diff, 0.0)  # from the observed loss to the tolerance
    needs = pair.needs(room, ruling.critical) if room > 0 else None
    reason = "the adjusted interval includes a loss as large as the tolerance"
    return replace(row, verdict="not shown safe", reason=reason, needs=needs)


def _rare(what: str, cell: TestedCell) -> str:
    """Return the reason why an interval within its bound does not exclude a change that few clusters have."""
    drawn, seen = cell.drawn, "no item changed, but " if cell.pair.unchanged else ""
    if drawn.changes.worst is None:
        return f"{seen}the metric has no range: the suite's `worst` must give the largest {what} of a cluster"
    units = "items" if drawn.clusters > cell.pair.clusters else "clusters"
    return f"{seen}{drawn.clusters} {units} do not exclude a large {what} on a few {units} that were not drawn"


def _too_few(pair: Pair) -> dict[str, Any]:
    return {
        "reason": f"too few clusters: {pair.clusters}, at least {FEW_CLUSTERS} needed",
        "needs": pair.needs(abs(pair.diff)) or math.ceil(pair.n * MANY_CLUSTERS / pair.clusters),
    }


def _few_changed(pair: Pair) -> bool:
    """Return True if less than half of the clusters changed; more items then help as well as more clusters."""
    return 2 * pair.changes.moved < pair.clusters


def _never_significant(pair: Pair, ruling: Ruling) -> str:
    return (
        f"no difference can be significant: even if all {pair.changes.moved} changed clusters had changed in the same direction, the "
        f"adjusted p would be {ruling.least:.2g}; more clusters or fewer comparisons are needed"
    )


def _companion(task: Table, base: str, digest: str) -> Companion | None:
    if task.metric == MARGIN or not task.margins:
        return None
    pair, start = paired(task.margins[base], task.margins[digest], task.cluster.tolist()), float(task.margins[base].mean())
    return Companion(MARGIN, "nats", start + pair.diff, start, pair.diff, *pair.interval(0.05), pair.p)


def interference(tasks: Sequence[Table], bricks: Sequence[Configuration], rows: Sequence[Difference]) -> dict[str, Any]:
    """Return the matrix of differences of each brick alone from the base, by brick and task."""
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
