"""Comparison of scored configurations with one baseline: paired differences, verdicts, kept, interference, flips.

Nothing is scored here. Rows of the family (primary metric of each task x configurations other than the baseline) get Holm-adjusted
p values; `low_adj, high_adj` are intervals at the level at which Holm tested the row, so that they exclude 0 exactly when
p_adj <= alpha, and they decide the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import WorkbenchError, nearest
from workbench.scores import Configuration, Scores, Store
from workbench.statistics import FEW_CLUSTERS, Floats, Paired, holm, paired, score_interval
from workbench.suites import Suite
from workbench.tables import Table, configurations_of, named, suites_of, tables_of

_SMALL = 100  # items below which a task is called small


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


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. `document()` is the stable JSON form; `worse` is what a gate looks at."""

    baseline: str
    rows: tuple[Difference, ...]
    rest: Mapping[str, Any]

    @property
    def worse(self) -> list[Difference]:
        """Rows in which a configuration that is no control is worse than the baseline."""
        return [row for row in self.rows if row.verdict == "worse" and row.role == "configuration"]

    def document(self) -> dict[str, Any]:
        """JSON document; infinite bounds (metrics without a range, too few clusters) are null."""
        document: dict[str, Any] = _finite(
            {"version": 1, "baseline": self.baseline, "rows": [asdict(row) for row in self.rows], **self.rest}
        )
        return document


def compare(
    store: Store,
    scores: Sequence[Scores],
    *,
    baseline: str | None = None,
    suites: Mapping[str, Suite] | None = None,
    project: Path | None = None,
    command: str = "",
) -> Comparison:
    """Compare stored scores.

    Args:
        scores: Of all configurations, controls included, over one or several suites; equal digests are shown once.
        baseline: A name or alias; the suite's own if not given.
        suites: Suites by name whose analysis settings (alpha, chance, ...) replace the stored ones.
        project: Where recipes are read from, for the report.
        command: What reproduces the comparison.
    Errors: scores of one suite under different plans, unknown baseline, baseline not scored on a suite.
    """
    if not scores:
        raise WorkbenchError("nothing to compare: no scores", "Score something first: workbench eval RECIPE")
    settings = suites_of(store, scores, suites or {})
    first = next(iter(settings.values()))
    entries = configurations_of(scores)
    names = [entry[0].configuration.name for entry in entries]
    base = named(entries, baseline or first.baseline)
    tasks = tables_of(store, scores, settings)
    others = [entry[0].configuration for entry in entries if entry[0].configuration.digest != base.digest]
    for task in tasks:
        if base.digest not in task.values:
            raise WorkbenchError(
                f"baseline '{base.name}' has no scores on suite '{task.suite.suite}'", "Score it, or name another baseline."
            )
    alpha = min(suite.alpha for suite in settings.values())
    rows = _differences(tasks, base, others, alpha)
    root = next((e[0].configuration for e in entries if e[0].configuration.role == "base"), None)
    bricks = [c for c in (e[0].configuration for e in entries) if c.role == "brick"]
    against_root = rows if root is None or root.digest == base.digest else _differences(tasks, root, bricks, alpha)
    family = {
        "size": len(rows),
        "alpha": alpha,
        "correction": "holm",
        "min_effect": max(suite.min_effect for suite in settings.values()),
        "text": f"primary metric of {len(tasks)} tasks x {len(others)} configurations against {base.name}",
    }
    return Comparison(
        base.name,
        tuple(rows),
        {
            "configurations": [_summary(entry, tasks, entries, project) for entry in entries],
            "tasks": [
                {
                    "task": t.name,
                    "metric": t.metric,
                    "n": len(t.items),
                    "clusters": int(t.cluster.max()) + 1,
                    "chance": t.chance,
                    "role": t.suite.role_of(t.name),
                    "owner": t.suite.owners.get(t.name),
                    "suite": t.suite.suite,
                    "plan": t.plan,
                }
                for t in tasks
            ],
            "interference": _interference(tasks, bricks if root else [], against_root),
            "family": family,
            "flips": {c.name: _flips(tasks, base, c) for c in others},
            "provenance": {
                "suites": list(settings),
                "plans": list(dict.fromkeys(s.plan for s in scores)),
                "versions": scores[0].versions,
                "device": ", ".join(sorted({s.device for s in scores})),
                "command": command,
                "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
            "warnings": list(_warnings(scores, settings, tasks, entries, names, family)),
        },
    )


def _differences(tasks: Sequence[Table], base: Configuration, others: Iterable[Configuration], alpha: float) -> list[Difference]:
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


def _summary(
    entry: Sequence[Scores], tasks: Sequence[Table], entries: Sequence[Sequence[Scores]], project: Path | None
) -> dict[str, Any]:
    """One configuration: scores with intervals, mean over skills, and what it kept of its parents."""
    c = entry[0].configuration
    mine = [t for t in tasks if c.digest in t.values]
    scores = {}
    for t in mine:
        low, high = score_interval(t.values[c.digest], t.cluster)
        value = float(t.values[c.digest].mean())
        scores[t.name] = {"value": value, "low": low, "high": high, "corrected": float(t.corrected(value)), "n": len(t.items)}
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


def _interval(value: float, draws: Floats) -> dict[str, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"value": value, "low": float(low), "high": float(high)}


def _interference(tasks: Sequence[Table], bricks: Sequence[Configuration], rows: Sequence[Difference]) -> dict[str, Any]:
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


def _flips(tasks: Sequence[Table], base: Configuration, c: Configuration) -> list[dict[str, Any]]:
    """Items whose primary metric differs from the baseline's, with both answers."""
    flips = []
    for t in tasks:
        if c.digest not in t.values:
            continue
        for i in np.flatnonzero(t.values[c.digest] != t.values[base.digest]).tolist():
            answers = ({k: t.rows[d][i][k] for k in ("response", "metrics", "loglikelihoods")} for d in (base.digest, c.digest))
            item = {k: t.items[i][k] for k in ("task", "id", "cluster", "prompt", "gold", "choices")}
            flips.append({**item, "baseline": next(answers), "configuration": next(answers)})
    return flips


def _warnings(
    scores: Sequence[Scores],
    suites: Mapping[str, Suite],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    names: Sequence[str],
    family: Mapping[str, Any],
) -> Iterable[str]:
    """What a reader should know before believing a row."""
    if any(s.partial for s in scores):
        yield "Partial: items were cut by --limit; these scores are for a quick look only."
    for t in tasks:
        k = int(t.cluster.max()) + 1
        if k < FEW_CLUSTERS:
            yield f"{t.name}: {k} clusters; below {FEW_CLUSTERS} no verdict is given."
        elif k < 20:
            yield f"{t.name}: {k} clusters; tests by sign flips find only large differences."
        if len(t.items) < _SMALL:
            yield f"{t.name}: {len(t.items)} items; if one in ten changes, a difference below {0.9 / math.sqrt(len(t.items)):.0%} can stay hidden."
    if len(suites) > 1:
        yield f"{len(suites)} suites are compared together: the family and its correction span all of them."
    if len({s.device for s in scores}) > 1:
        yield "Scored on different devices: small differences may come from rounding."
    if family["size"] > 20:
        yield f"{family['size']} comparisons in the family: each needs a smaller p; drop rows that nobody asks about."
    shown = {n for e in entries for s in e for n in s.names}
    roles = {e[0].configuration.role for e in entries} | {a.role for e in entries for s in e for a in s.aliases}
    parents = dict.fromkeys(p for e in entries if e[0].configuration.role == "configuration" for p in e[0].configuration.parents)
    missing = [p for p in parents if p not in shown]
    if "base" not in roles:
        missing.insert(0, "base")
    if len(parents) > 1 and "average" not in roles:
        missing.append("average")
    if missing:
        yield f"Missing controls: {', '.join(missing)}. A merge is judged against its base, each parent and their average."
    for t in tasks:
        owner = t.suite.owners.get(t.name)
        if owner is not None and owner not in shown and parents:
            yield f"{t.name}: its owner '{owner}' is not among the scored configurations. {nearest(owner, names)}"
        absent = [e[0].configuration.name for e in entries if e[0].configuration.digest not in t.values]
        if absent:
            yield f"{t.name}: not scored for {', '.join(absent)}."


def _finite(value: Any) -> Any:
    """Plain JSON: infinite and undefined numbers become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
