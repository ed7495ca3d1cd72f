"""The comparison document as typed objects: absent keys become None, order is base, bricks, average, rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.report.numbers import POINTS, RAW, Unit

ROLES = ("base", "brick", "average", "configuration")
VERDICTS = ("better", "worse", "equivalent", "cannot tell", "no item changed")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, in stored units."""

    value: float | None
    low: float | None
    high: float | None
    corrected: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Task:
    """A task of the comparison; `metric` is its primary metric."""

    name: str
    metric: str
    role: str
    n: int | None
    clusters: int | None
    chance: float | None
    owner: str | None
    unit: Unit


@dataclass(frozen=True)
class Difference:
    """One configuration minus the baseline on one task and metric."""

    configuration: str
    role: str
    task: str
    metric: str
    value: float | None
    baseline_value: float | None
    diff: float | None
    low: float | None
    high: float | None
    low_adj: float | None
    high_adj: float | None
    p: float | None
    p_adj: float | None
    n: int | None
    clusters: int | None
    mde: float | None
    needs: int | None
    verdict: str | None
    reason: str | None
    wins: int | None
    losses: int | None

    @property
    def word(self) -> str | None:
        """One of the five verdict words; the document may add to it, as in "cannot tell (few clusters)"."""
        return verdict_word(self.verdict)


@dataclass(frozen=True)
class Effect:
    """A cell of the interference matrix: one brick alone minus the base on one task."""

    brick: str
    task: str
    diff: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class Configuration:
    """A scored configuration; `kept` is its share of the best parent's chance-corrected score."""

    name: str
    role: str
    digest: str
    parents: tuple[str, ...]
    recipe: str | None
    recipe_text: str | None
    seconds: float | None
    mean: Estimate | None
    kept_mean: Estimate | None
    kept: dict[str, Estimate]
    scores: dict[str, Estimate]
    aliases: tuple[str, ...]

    @property
    def is_control(self) -> bool:
        return self.role != "configuration"


@dataclass(frozen=True)
class View:
    """Everything that the pages show.

    `rows` holds all differences, `differences` those of primary metrics by (configuration, task); `effects`
    holds the interference matrix by (brick, task). `margin` is the smallest effect of interest, where known.
    """

    baseline: str
    tasks: tuple[Task, ...]
    configurations: tuple[Configuration, ...]
    rows: tuple[Difference, ...]
    differences: dict[tuple[str, str], Difference]
    alpha: float
    correction: str
    family: str
    family_size: int | None
    margin: float | None
    bricks: tuple[str, ...]
    effect_tasks: tuple[str, ...]
    effects: dict[tuple[str, str], Effect]
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def controls(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if c.is_control)

    @property
    def named(self) -> tuple[Configuration, ...]:
        return tuple(c for c in self.configurations if not c.is_control)

    @property
    def judged(self) -> tuple[Configuration, ...]:
        """Named configurations other than the baseline."""
        return tuple(c for c in self.named if c.name != self.baseline)

    @property
    def skills(self) -> tuple[Task, ...]:
        return tuple(t for t in self.tasks if t.role != "retention")

    @property
    def retention(self) -> tuple[Task, ...]:
        return tuple(t for t in self.tasks if t.role == "retention")

    def compared(self, name: str, tasks: Iterable[Task]) -> list[Difference]:
        """Differences of one configuration on these tasks; tasks it was not scored on are left out."""
        found = (self.differences.get((name, t.name)) for t in tasks)
        return [d for d in found if d is not None]

    def unit(self, task: str, metric: str | None = None) -> Unit:
        """Unit of a task's scores; a secondary metric has its own."""
        named = next((t for t in self.tasks if t.name == task), None)
        if named is not None and metric in (None, named.metric):
            return named.unit
        return _unit(r for r in self.rows if r.task == task and r.metric == metric)


def verdict_word(verdict: str | None) -> str | None:
    """The verdict word that a verdict begins with, None for anything else."""
    return next((w for w in VERDICTS if (verdict or "").startswith(w)), None)


def view_of(document: Mapping[str, Any]) -> View:
    """Reads the document; raises KeyError where a configuration, task or metric has no name."""
    rows = tuple(_difference(r) for r in document.get("rows") or ())
    tasks = tuple(_task(t, rows) for t in document.get("tasks") or ())
    primary = {t.name: t.metric for t in tasks}
    configurations = [_configuration(c) for c in document.get("configurations") or ()]
    family = document.get("family") or {}
    interference = document.get("interference") or {}
    return View(
        baseline=str(document.get("baseline") or "base"),
        tasks=tasks,
        configurations=tuple(sorted(configurations, key=lambda c: ROLES.index(c.role))),
        rows=rows,
        differences={(r.configuration, r.task): r for r in rows if primary.get(r.task) == r.metric},
        alpha=family.get("alpha") or 0.05,
        correction=str(family.get("correction") or "none"),
        family=str(family.get("text") or ""),
        family_size=family.get("size"),
        margin=family.get("min_effect"),
        bricks=tuple(str(b) for b in interference.get("bricks") or ()),
        effect_tasks=tuple(str(t) for t in interference.get("tasks") or ()),
        effects={(e.brick, e.task): e for e in _effects(interference) if e.diff is not None},
        provenance=document.get("provenance") or {},
        warnings=tuple(str(w) for w in document.get("warnings") or ()),
    )


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _difference(row: Mapping[str, Any]) -> Difference:
    fields: dict[str, Any] = {name: row.get(name) for name in Difference.__dataclass_fields__}
    fields["role"] = str(row.get("role") or "")
    fields |= {name: str(row[name]) for name in ("configuration", "task", "metric")}
    return Difference(**fields)


def _effects(matrix: Mapping[str, Any]) -> Iterable[Effect]:
    for b, brick in enumerate(matrix.get("bricks") or ()):
        for t, task in enumerate(matrix.get("tasks") or ()):
            cells = (_cell(matrix.get(key), b, t) for key in ("diff", "low", "high", "verdict"))
            yield Effect(str(brick), str(task), *cells)


def _cell(rows: Sequence[Sequence[Any] | None] | None, row: int, column: int) -> Any:
    """Entry of a matrix, None where it or its row is absent."""
    line = rows[row] if rows and row < len(rows) else None
    return line[column] if line and column < len(line) else None


def _task(task: Mapping[str, Any], rows: tuple[Difference, ...]) -> Task:
    name, metric = str(task["task"]), str(task.get("metric") or "")
    return Task(
        name=name,
        metric=metric,
        role=str(task.get("role") or "skill"),
        n=task.get("n"),
        clusters=task.get("clusters"),
        chance=task.get("chance"),
        owner=task.get("owner"),
        unit=_unit(r for r in rows if r.task == name and r.metric == metric),
    )


def _unit(rows: Iterable[Difference]) -> Unit:
    """Percent and points when all scores are shares (between 0 and 1), raw numbers otherwise."""
    levels = [v for r in rows for v in (r.value, r.baseline_value) if v is not None]
    return POINTS if all(0 <= v <= 1 for v in levels) else RAW


def _configuration(row: Mapping[str, Any]) -> Configuration:
    role = str(row.get("role") or "configuration")
    return Configuration(
        name=str(row["name"]),
        role=role if role in ROLES else "configuration",
        digest=str(row.get("digest") or ""),
        parents=tuple(str(p) for p in row.get("parents") or ()),
        recipe=row.get("recipe"),
        recipe_text=row.get("recipe_text"),
        seconds=row.get("seconds"),
        mean=_estimate(row.get("mean")),
        kept_mean=_estimate(row.get("kept_mean")),
        kept=_estimates(row.get("kept")),
        scores=_estimates(row.get("scores")),
        aliases=tuple(str(a["name"] if isinstance(a, Mapping) else a) for a in row.get("aliases") or ()),
    )


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    if value is None or value.get("value") is None:
        return None
    return Estimate(value["value"], *(value.get(k) for k in ("low", "high", "corrected", "n")))


def _estimates(values: Mapping[str, Any] | None) -> dict[str, Estimate]:
    found = {str(k): _estimate(v) for k, v in (values or {}).items()}
    return {k: v for k, v in found.items() if v is not None}
