"""What a comparison says of one configuration: scores, mean over skills, what it kept and forgot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.paired import pooled
from workbench.scores import Configuration, Scores
from workbench.statistics import FEW_CLUSTERS, Floats, score_interval
from workbench.tables import Table


def summary(
    entry: Sequence[Scores],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    root: Configuration | None,
    project: Path | None,
) -> dict[str, Any]:
    """One configuration: scores with intervals, mean over skills, what it kept of its parents and forgot of the base, `root`."""
    c = entry[0].configuration
    mine = [t for t in tasks if c.digest in t.values]
    scores = {}
    for t in mine:
        low, high = t.interval(c.digest)
        value = t.value(c.digest)
        corrected = float(t.corrected(value)) if t.correctable else None
        scores[t.name] = {"value": value, "low": low, "high": high, "corrected": corrected, "n": len(t.items)}
    digests = {name: e[0].configuration.digest for e in entries for s in e for name in s.names}
    kept, kept_mean = _kept(mine, c, {n: digests[n] for n in c.parents if digests.get(n, c.digest) != c.digest})
    recipe = project / c.recipe if project and c.recipe else None
    return {
        "name": c.name,
        "role": c.role,
        "digest": c.digest,
        "parents": list(c.parents),
        "recipe": c.recipe,
        "recipe_text": recipe.read_text("utf-8") if recipe and recipe.is_file() else None,
        "aliases": sorted({n for s in entry for n in s.names} - {c.name}),
        "seconds": round(sum(s.seconds for s in entry), 2),
        "mean": _mean([t for t in mine if t.skill], c.digest),
        "kept": kept,
        "kept_mean": kept_mean,
        "forgetting": forgetting(mine, root, c) if root else None,
        "parameters": c.parameters,
        "bytes": c.bytes,
        "bricks": c.bricks,
        "check": [s.check.model_dump() if s.check else None for s in entry],
        "scores": scores,
    }


def _mean(tasks: Sequence[Table], digest: str) -> dict[str, float] | None:
    """Mean chance-corrected score over tasks; clusters are resampled within tasks.

    Where a task's items are all alike resampling sees no spread, and the single scores' intervals are added in squares instead.
    """
    if not tasks:
        return None
    value = float(np.mean([t.corrected(t.values[digest].mean()) for t in tasks]))
    if all(np.ptp(t.values[digest]) > 0 for t in tasks):
        return _interval(value, np.mean([t.resampled[digest] for t in tasks], axis=0))
    ends = [(t.values[digest].mean(), *score_interval(t.values[digest], t.cluster), 1 - t.chance) for t in tasks]
    down = math.sqrt(sum(((v - low) / scale) ** 2 for v, low, _, scale in ends)) / len(tasks)
    up = math.sqrt(sum(((high - v) / scale) ** 2 for v, _, high, scale in ends)) / len(tasks)
    return {"value": value, "low": value - down, "high": value + up}


def _kept(tasks: Sequence[Table], c: Configuration, parents: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Corrected score over the best parent's, by task, and the ratio of the sums over these tasks.

    A task counts if it is a skill that one of the bricks behind `c` owns, or, where no owner is declared, any skill; and if the best parent is above
    chance by more than its own error, since a ratio to nothing says nothing. Paired cluster bootstrap, percentile interval; the best
    parent is chosen once, on all items.
    """
    kept, over, under = {}, [], []
    for t in tasks:
        owner = t.suite.owners.get(t.name)
        scored = {name: digest for name, digest in parents.items() if digest in t.values}
        if not t.skill or not scored or (owner is not None and owner not in c.parents):
            continue
        best = max(scored.values(), key=lambda digest: float(t.values[digest].mean()))
        if np.percentile(t.resampled[best], 2.5) <= 0:
            continue
        top, bottom = t.corrected(t.values[c.digest].mean()), t.corrected(t.values[best].mean())
        kept[t.name] = _interval(float(top / bottom), t.resampled[c.digest] / np.maximum(t.resampled[best], 1e-9))
        over.append((top, t.resampled[c.digest]))
        under.append((bottom, t.resampled[best]))
    if not kept:
        return {}, None
    (top, draws), (bottom, draws_below) = ((sum(p[0] for p in x), np.sum([p[1] for p in x], axis=0)) for x in (over, under))
    return kept, _interval(float(top / bottom), draws / np.maximum(draws_below, 1e-9))


def forgetting(tasks: Sequence[Table], root: Configuration, c: Configuration) -> dict[str, Any] | None:
    """Chance-corrected score minus the base's, mean over the retention tasks; below 0 where something was forgotten.

    One test and interval over the clusters of all tasks, alone, at 95 %; safe where no mean loss of the largest tolerance is left.
    """
    found = [
        t for t in tasks if t.suite.role_of(t.name) == "retention" and t.correctable and {root.digest, c.digest} <= set(t.values)
    ]
    if not found or c.digest == root.digest:
        return None
    pairs = [t.paired(root.digest, c.digest) for t in found]
    if all(pair.unchanged for pair in pairs):
        return {"diff": 0.0, "low": 0.0, "high": 0.0, "verdict": "no item changed"}
    changes = pooled([pair.changes for pair in pairs], [1 / (1 - t.chance) for t in found])
    low, high = changes.interval(changes.critical(0.05), changes.p <= 0.05)
    verdict = "not shown safe"
    if min(pair.clusters for pair in pairs) >= FEW_CLUSTERS:
        if low > -max(t.tolerance or 0.0 for t in found):
            verdict = "safe"
        elif high < 0:
            verdict = "worse"
    return {"diff": changes.mean, "low": low, "high": high, "verdict": verdict}


def _interval(value: float, draws: Floats) -> dict[str, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"value": value, "low": float(low), "high": float(high)}
