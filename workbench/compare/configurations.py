"""A comparison's summary of one configuration: scores, mean over skills, kept skill and forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.compare.costs import costs_of
from workbench.compare.kept import kept_of
from workbench.compare.leaders import pair_of
from workbench.compare.tables import Table
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS, Floats, expanded_tail
from workbench.scores.store import DESIGN_ORDER, Configuration, Scores


def summary(
    entry: Sequence[Scores],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    root: Configuration | None,
    project: Path | None,
) -> dict[str, Any]:
    """Return a configuration's scores with intervals, mean over skills, kept skill of its parents and forgetting.

    Args:
        entry: Scores of the configuration, one per suite.
        tasks: Tables of all tasks.
        entries: Scores of all configurations, to find the parents.
        root: The base, for forgetting.
        project: Project folder from which the recipe's text is read.
    """
    c = entry[0].configuration
    tables = [t for t in tasks if c.digest in t.values]
    scores = {}
    for t in tables:
        low, high = t.interval(c.digest)
        value = t.value(c.digest)
        corrected = float(t.corrected(value)) if t.correctable and t.chance is not None else None
        scores[t.name] = {"value": value, "low": low, "high": high, "corrected": corrected, "n": len(t.items)}
    digests = {name: e[0].configuration.digest for e in entries for s in e for name in s.names}
    kept, kept_mean = kept_of(tables, c, {n: digests[n] for n in c.parents if digests.get(n, c.digest) != c.digest})
    recipe = project / c.recipe if project and c.recipe else None
    return {
        "name": c.name,
        "role": c.role,
        "digest": c.digest,
        "parents": list(c.parents),
        "recipe": c.recipe,
        "recipe_text": recipe.read_text("utf-8") if recipe and recipe.is_file() else None,
        "roles": roles_of(entry),
        "aliases": sorted({n for s in entry for n in s.names} - {c.name}),
        "seconds": round(sum(s.seconds for s in entry), 2),
        "mean": mean_score([t for t in tables if t.skill], c.digest),
        "kept": kept,
        "kept_mean": kept_mean,
        "forgetting": forgetting(tables, root, c) if root else None,
        "parameters": c.parameters,
        "bytes": c.bytes,
        "form": c.form,
        "written": c.written,
        "bricks": c.bricks,
        "axes": c.axes,
        "check": [s.check.model_dump() if s.check else None for s in entry],
        "scores": scores,
        "costs": costs_of(entry, tasks),
    }


def roles_of(entry: Sequence[Scores]) -> list[str]:
    """Return a configuration's role and the roles of its aliases, in design order."""
    roles = {entry[0].configuration.role, *(alias.role for s in entry for alias in s.aliases)}
    return [role for role in DESIGN_ORDER if role in roles]


def with_twins(entries: Sequence[Sequence[Scores]], scores: Sequence[Scores]) -> list[list[Scores]]:
    """Return the configurations, and after each one the recipes and models with the same weights under their own names."""
    displayed = []
    for entry in entries:
        displayed.append(list(entry))
        first = entry[0].configuration
        if first.role == "configuration":
            others = {s.configuration.name: s.configuration for s in scores if s.configuration.role == "configuration"}
            displayed += [
                [s.called(c) for s in entry] for c in others.values() if c.digest == first.digest and c.name != first.name
            ]
    return displayed


def mean_score(tasks: Sequence[Table], digest: str) -> dict[str, float] | None:
    """Return the mean chance-corrected score over tasks, with its 95 % interval.

    Clusters are resampled within tasks; the percentiles are expanded to the t quantile of the task with the fewest effective clusters
    (Hesterberg 2015, expanded percentile).

    If a task has fewer than 20 clusters, or equal scores on all items so that resampling shows no spread, the interval is the root of the
    summed squares of the tasks' own intervals.
    """
    if not tasks:
        return None
    value = float(np.mean([t.corrected(t.values[digest].mean()) for t in tasks]))
    if all(t.clusters >= MANY_CLUSTERS and np.ptp(t.values[digest]) > 0 for t in tasks):
        low, high = _expanded(np.mean([t.resampled[digest] for t in tasks], axis=0), tasks)
        return {"value": value, "low": low, "high": high}
    ends = [(t.values[digest].mean(), *t.interval(digest), t.span) for t in tasks]
    down = math.sqrt(sum(((v - low) / scale) ** 2 for v, low, _, scale in ends)) / len(tasks)
    up = math.sqrt(sum(((high - v) / scale) ** 2 for v, _, high, scale in ends)) / len(tasks)
    return {"value": value, "low": value - down, "high": value + up}


def forgetting(tasks: Sequence[Table], root: Configuration, c: Configuration) -> dict[str, Any] | None:
    """Return the mean difference of chance-corrected scores from the base over the retention tasks; negative values mean forgetting.

    One test and its 95 % interval cover the clusters of all tasks, outside the families. The verdict is "safe" if a loss as large
    as the tasks' mean tolerance, which is corrected for chance like the scores, is excluded as for a guarded task.
    """
    retention = [
        t for t in tasks if t.suite.role_of(t.task) == "retention" and t.correctable and {root.digest, c.digest} <= set(t.values)
    ]
    if not retention or c.digest == root.digest:
        return None
    pair, drawn = (pair_of(retention, c.digest, root.digest, drawn=drawn) for drawn in (False, True))
    low, high = pair.interval(0.05)
    tolerance = float(np.mean([(t.tolerance or 0.0) / t.span for t in retention]))
    verdict = "no item changed" if pair.unchanged else "not shown safe"
    if min(t.clusters for t in retention) >= FEW_CLUSTERS:
        if low > -tolerance and drawn.excludes(tolerance, -1, 0.025):
            verdict = "safe"
        elif high < 0:
            verdict = "worse"
    return {"diff": pair.diff, "low": low, "high": high, "verdict": verdict}


def _expanded(draws: Floats, tasks: Sequence[Table]) -> tuple[float, float]:
    """Return the 95 % percentiles of draws, expanded for the task with the fewest effective clusters."""
    tail = expanded_tail(0.025, min(t.effective for t in tasks))
    low, high = (float(x) for x in np.quantile(draws, (tail, 1 - tail)))
    return low, high
