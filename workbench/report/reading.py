"""Reading of the comparison document: absent keys become None; named configurations come first, then base, bricks, average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.report import costs
from workbench.report.numbers import NATS, POINTS, Unit, raw
from workbench.report.view import (
    ROLES,
    CheckView,
    CompanionView,
    ConfigurationView,
    DifferenceView,
    Effect,
    Estimate,
    TaskView,
    View,
    unit_of,
)


def view_of(document: Mapping[str, Any]) -> View:
    """Build the view of a comparison document.

    Raises:
        KeyError: If a configuration, task or metric has no name.
    """
    rows = tuple(_difference(r) for r in document.get("rows") or ())
    family = document.get("family") or {}
    tasks = _tasks(document.get("tasks") or (), rows, family.get("min_effect"))
    primary = {t.name: t.metric for t in tasks}
    provenance = document.get("provenance") or {}
    suites = [str(s.get("suite") or s.get("name") if isinstance(s, Mapping) else s) for s in provenance.get("suites") or ()]
    configurations = [_configuration(c, suites) for c in document.get("configurations") or ()]
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
        families={name: int(family[name]) for name in ("compared", "guarded", "controls") if family.get(name) is not None},
        margin=family.get("min_effect"),
        bricks=tuple(str(b) for b in interference.get("bricks") or ()),
        effect_tasks=tuple(str(t) for t in interference.get("tasks") or ()),
        effects={(e.brick, e.task): e for e in _effects(interference) if e.diff is not None},
        provenance=provenance,
        warnings=tuple(str(w) for w in document.get("warnings") or ()),
        recommendation=document.get("recommendation") or None,
        sweeps=tuple(document.get("sweeps") or ()),
    )


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinities, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _difference(row: Mapping[str, Any]) -> DifferenceView:
    fields: dict[str, Any] = {name: row.get(name) for name in DifferenceView.__dataclass_fields__}
    fields["role"] = str(row.get("role") or "")
    if row.get("needs") and row.get("n") and row["needs"] <= row["n"]:
        fields["needs"] = None  # there are already that many items; more would not help
    fields |= {name: str(row[name]) for name in ("configuration", "task", "metric")}
    fields |= {"lower": bool(row.get("lower")), "ratio": bool(row.get("ratio")), "companion": _companion(row.get("companion"))}
    return DifferenceView(**fields)


def _companion(entry: Mapping[str, Any] | None) -> CompanionView | None:
    if not entry or entry.get("diff") is None:
        return None
    unit = NATS if entry.get("unit") == NATS.word else Unit(1.0, NATS.decimals, str(entry.get("unit") or ""))
    values = {k: entry.get(k) for k in ("value", "baseline_value", "diff", "low", "high", "p")}
    return CompanionView(metric=str(entry.get("metric") or "margin"), unit=unit, **values)


def _effects(matrix: Mapping[str, Any]) -> Iterable[Effect]:
    for b, brick in enumerate(matrix.get("bricks") or ()):
        for t, task in enumerate(matrix.get("tasks") or ()):
            cells = (_cell(matrix.get(key), b, t) for key in ("diff", "low", "high", "verdict"))
            yield Effect(str(brick), str(task), *cells)


def _cell(rows: Sequence[Sequence[Any] | None] | None, row: int, column: int) -> Any:
    """Return an entry of a matrix, or None if it or its row is missing."""
    line = rows[row] if rows and row < len(rows) else None
    return line[column] if line and column < len(line) else None


def _tasks(entries: Sequence[Mapping[str, Any]], rows: tuple[DifferenceView, ...], margin: float | None) -> tuple[TaskView, ...]:
    tasks = [_task(t, rows, margin) for t in entries]
    units = {t.name: t.unit for t in tasks if t.contrast is None}
    # Scores of a contrast can be negative, so its unit is that of its first task.
    return tuple(replace(t, unit=units[t.contrast[0]]) if t.contrast and units.get(t.contrast[0]) == POINTS else t for t in tasks)


def _task(task: Mapping[str, Any], rows: tuple[DifferenceView, ...], margin: float | None) -> TaskView:
    """Return the view of a task; shares are shown in points, other metrics in their own unit."""
    name, metric = str(task["task"]), str(task.get("metric") or "")
    task_rows = [r for r in rows if r.task == name and r.metric == metric]
    lower, ratio, contrast = bool(task.get("lower")), task.get("ratio") or None, task.get("contrast") or None
    unit = unit_of(task_rows, lower, ratio)
    if contrast and unit == POINTS:
        unit = raw(max((abs(v) for r in task_rows for v in (r.value, r.baseline_value) if v is not None), default=0.0))
    return TaskView(
        name=name,
        metric=metric,
        role=str(task.get("role") or "skill"),
        n=task.get("n"),
        clusters=task.get("clusters"),
        chance=task.get("chance"),
        owner=task.get("owner"),
        unit=unit,
        lower=lower,
        ratio=ratio,
        scorer=task.get("scorer"),
        contrast=(str(contrast["of"]), str(contrast["minus"])) if contrast else None,
        uncorrected="chance" in task and task["chance"] is None,
        min_effect=task.get("min_effect", margin),  # older documents have one value for all tasks
        tolerance=task.get("tolerance"),
    )


def _configuration(row: Mapping[str, Any], suites: Sequence[str]) -> ConfigurationView:
    """Return the view of a configuration."""
    role = str(row.get("role") or "configuration")
    return ConfigurationView(
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
        parameters=row.get("parameters"),
        bytes=row.get("bytes"),
        bricks={str(k): v for k, v in (row.get("bricks") or {}).items()},
        axes={str(b): {str(k): str(v) for k, v in (of or {}).items()} for b, of in (row.get("axes") or {}).items()},
        checks=tuple(_checks(row.get("check"), suites)),
        forgetting=_forgetting(str(row["name"]), row.get("forgetting")),
        roles=tuple(map(str, row.get("roles") or (role,))),
        costs=row.get("costs") or costs.of_older(row.get("seconds")),
    )


def _checks(entries: Sequence[Mapping[str, Any] | None] | None, suites: Sequence[str]) -> Iterable[CheckView]:
    """Yield checks; a check that names no suite belongs to the suite at its position."""
    for i, check in enumerate(entries or ()):
        if check:
            suite = str(check.get("suite") or (suites[i] if i < len(suites) else ""))
            rest = (check.get(k) for k in ("documents", "max_difference", "tolerance", "spread", "whole"))
            yield CheckView(suite, str(check.get("scorer") or ""), *rest)


def _forgetting(name: str, entry: Mapping[str, Any] | None) -> Effect | None:
    if not entry or entry.get("diff") is None:
        return None
    return Effect(name, "retention", *(entry.get(k) for k in ("diff", "low", "high", "verdict")))


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    if value is None or (value.get("value") is None and not value.get("reason")):
        return None
    return Estimate(value.get("value"), *(value.get(k) for k in ("low", "high", "corrected", "n", "reason")))


def _estimates(values: Mapping[str, Any] | None) -> dict[str, Estimate]:
    estimates = {str(k): _estimate(v) for k, v in (values or {}).items()}
    return {k: v for k, v in estimates.items() if v is not None}
