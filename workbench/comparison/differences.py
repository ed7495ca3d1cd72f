"""Differences from the baseline, one row per configuration and task, and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.scores import Configuration
from workbench.statistics import FEW_CLUSTERS, Paired, holm, paired
from workbench.tables import Table


@dataclass(frozen=True)
class Difference:
    """One configuration against the baseline on one task's primary metric.

    Attributes:
        low, high: Plain 95 % interval of the difference.
        low_adj, high_adj: At Holm's level for this row; they decide.
        mde: Difference that would be found with 80 % power at that level; None if no spread was seen.
        needs: Items, about, to tell a difference as large as this one, or min_effect if that is larger; with "cannot tell" only.
        verdict: better | worse | equivalent | cannot tell | no item changed.
        reason: Why it cannot tell.
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
    verdict: str
    reason: str | None
    wins: int
    losses: int


def differences(tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration], alpha: float) -> list[Difference]:
    """One row per configuration and task: one family."""
    cells = [
        (c, t, paired(t.values[base.digest], t.values[c.digest], t.cluster.tolist()))
        for c in others
        for t in tasks
        if c.digest in t.values
    ]
    adjusted, levels = holm([pair.p for *_, pair in cells], alpha)
    return [
        _difference(c, t, pair, float(t.values[base.digest].mean()), p_adj, level, alpha)
        for (c, t, pair), p_adj, level in zip(cells, adjusted, levels, strict=True)
    ]


def _difference(
    c: Configuration, task: Table, pair: Paired, start: float, p_adj: float, level: float, alpha: float
) -> Difference:
    margin = task.suite.min_effect
    low, high = pair.interval(0.05)
    low_adj, high_adj = pair.interval(level)
    row = Difference(
        c.name,
        c.role,
        task.name,
        task.metric,
        start + pair.diff,
        start,
        pair.diff,
        low,
        high,
        low_adj,
        high_adj,
        pair.p,
        p_adj,
        pair.n,
        pair.clusters,
        pair.mde(level),
        None,
        "cannot tell",
        None,
        pair.wins,
        pair.losses,
    )
    if pair.unchanged:
        return replace(row, verdict="no item changed")
    if pair.clusters < FEW_CLUSTERS:
        return replace(
            row,
            reason=f"too few clusters: {pair.clusters}, at least {FEW_CLUSTERS} needed",
            needs=pair.needs(max(abs(pair.diff), margin), level) or math.ceil(pair.n * 20 / pair.clusters),
        )
    if p_adj <= alpha:
        return replace(row, verdict="better" if pair.diff > 0 else "worse")
    if -margin <= low_adj and high_adj <= margin:
        return replace(row, verdict="equivalent")
    return replace(
        row,
        reason="the interval holds 0 and more than the smallest effect of interest",
        needs=pair.needs(max(abs(pair.diff), margin), level),
    )


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
