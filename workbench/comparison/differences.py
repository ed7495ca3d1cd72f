"""Differences from the baseline, one row per configuration and task, and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.scores import Configuration
from workbench.statistics import FEW_CLUSTERS, T_CLUSTERS, Pair, holm, paired
from workbench.suites import MARGIN
from workbench.tables import Table


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
        low_adj, high_adj: At the level that the correction leaves to this row; they decide.
        mde: Difference that would be found with 80 % power at that level; None if no spread was seen.
        needs: Items, about, to tell a difference as large as this one, or min_effect if that is larger; with "cannot tell" only.
        verdict: better | worse | equivalent | cannot tell | no item changed.
        reason: Why it cannot tell.
        wins, losses: Items that got better, worse.
        lower: Lower is better.
        ratio: A ratio of sums over items, not a mean.
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
    verdict: str
    reason: str | None
    wins: int
    losses: int
    lower: bool = False
    ratio: bool = False
    companion: Companion | None = None


def differences(
    tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration], alpha: float, correction: str = "holm"
) -> list[Difference]:
    """One row per configuration and task: one family."""
    cells = [(c, t, t.paired(base.digest, c.digest)) for c in others for t in tasks if c.digest in t.values]
    p = [pair.p for *_, pair in cells]
    adjusted, levels = holm(p, alpha) if correction == "holm" else (p, [alpha] * len(p))
    return [
        replace(
            _difference(c, t, pair, t.value(base.digest), p_adj, level, alpha),
            companion=_companion(t, base.digest, c.digest),
        )
        for (c, t, pair), p_adj, level in zip(cells, adjusted, levels, strict=True)
    ]


def unchanged(tasks: Sequence[Table], base: Configuration, name: str) -> Iterator[Difference]:
    """Rows of a configuration, `name`, whose weights are the baseline's: nothing is tested."""
    again = replace(base, name=name, role="configuration")
    for t in tasks:
        yield _difference(again, t, t.paired(base.digest, base.digest), t.value(base.digest), 1.0, 0.05, 0.05)


def _difference(c: Configuration, task: Table, pair: Pair, start: float, p_adj: float, level: float, alpha: float) -> Difference:
    """The row with its verdict.

    Better and worse: the test at `level`, whose interval is low_adj, high_adj. Equivalent, where that finds nothing: both ends of this
    interval lie within +-min_effect, which is two one-sided tests of "the difference is at least min_effect", each at level / 2.
    """
    margin = task.min_effect
    low, high = pair.interval(0.05)
    low_adj, high_adj = pair.interval(level)
    gained, lost = (pair.losses, pair.wins) if task.lower else (pair.wins, pair.losses)
    row = Difference(
        configuration=c.name,
        role=c.role,
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
        p_adj=p_adj,
        n=pair.n,
        clusters=pair.clusters,
        mde=pair.mde(level),
        needs=None,
        verdict="cannot tell",
        reason=None,
        wins=gained,
        losses=lost,
        lower=task.lower,
        ratio=task.ratio is not None,
    )
    if pair.unchanged:
        return replace(row, verdict="no item changed")
    needs = pair.needs(max(abs(pair.diff), margin or 0.0), level)
    if pair.clusters < FEW_CLUSTERS:
        return replace(
            row,
            reason=f"too few clusters: {pair.clusters}, at least {FEW_CLUSTERS} needed",
            needs=needs or math.ceil(pair.n * T_CLUSTERS / pair.clusters),
        )
    if p_adj <= alpha:
        return replace(row, verdict="better" if (pair.diff > 0) != task.lower else "worse")
    if pair.clusters < T_CLUSTERS and 2.0 ** (1 - pair.clusters) > level:
        return replace(
            row,
            reason=f"too few clusters for this level: sign flips of {pair.clusters} give no p below {2.0 ** (1 - pair.clusters):.2g}",
            needs=needs or math.ceil(pair.n * T_CLUSTERS / pair.clusters),
        )
    if margin is None:
        return replace(row, reason="the interval holds 0, and the suite gives no min_effect for this metric", needs=needs)
    if -margin <= low_adj and high_adj <= margin:
        return replace(row, verdict="equivalent")
    return replace(row, reason="the interval holds 0 and more than the smallest effect of interest", needs=needs)


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
