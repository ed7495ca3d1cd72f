"""The report as Markdown: the page's tables and sentences, without the items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workbench.report import costs, edits, flips, guard, marks, routed, scatter, sweeps, wording
from workbench.report.decision import decision
from workbench.report.facts import facts, self_check
from workbench.report.glossary import glossary
from workbench.report.numbers import MINUS, MISSING, PERCENT, POINTS, Unit, about, amount, count, listed, p_value, size, small
from workbench.report.view import VERDICTS, ConfigurationView, DifferenceView, Estimate, TaskView, View
from workbench.tables import Cell, Table, fence
from workbench.tables import as_markdown as escape

ROLE_NOTES = {
    "base": "base",
    "brick": "brick alone",
    "average": "average",
    "memory": "facts in the prompt",
    "finetune": "fine-tuned on the facts",
    "adapter": "LoRA on the facts and paraphrases",
}
COST_UNITS = ("s", "", "", "bytes", None)
"""Units of the numbers of costs; licenses are no number."""


def markdown(document: Mapping[str, Any], view: View) -> str:
    """Return the whole report; text from users is escaped, so that it cannot start HTML, tables or code."""
    return text_of(_parts(document, view))


def tables(document: Mapping[str, Any], view: View) -> list[Table]:
    """Return the report's tables, and the matrix of differences, which the report has as rows."""
    matrix = marks.differences(view)
    found = [part for part in _parts(document, view) if isinstance(part, Table)]
    return [*found, *([_matrix("difference-matrix", "Configuration", matrix)] if matrix.rows else [])]


def text_of(parts: Iterable[str | Table]) -> str:
    """Return the parts of a report as Markdown."""
    return "\n\n".join(p.markdown() if isinstance(p, Table) else p for p in parts if p) + "\n"


def _parts(document: Mapping[str, Any], view: View) -> list[str | Table]:
    return [
        f"# {escape(wording.title(view))}",
        *_decision(view),
        *sweeps.tables(view),
        *([f"**{escape(' '.join(losses))}**"] if (losses := guard.harm(view)) else []),
        escape(" ".join(wording.headline(view))),
        escape(wording.scope(view)),
        *([f"> **{escape(view.partial)}**"] if view.partial else []),
        *(f"> **Control missing.** {escape(m)}" for m in wording.missing_controls(view)),
        *(escape(s) for s in wording.summary(view)),
        bullets(f"**{escape(f.name)}**: {escape(f.text)}" for f in wording.findings(view)),
        "## Summary",
        _summary(view),
        escape(f"Scores in percent; the mean is {wording.chance_correction(view, 'skill')}. Brackets are 95 % intervals."),
        *_undecided(view),
        *(f"No plain average of {escape(s)} was scored." for s in wording.without_average(view)),
        f"## Differences against {escape(view.baseline)}",
        differences(view),
        *_interference(view),
        *_kept(view),
        *_forgetting(view),
        *_edits(document, view),
        *_routed(document),
        *_flips(document, view),
        *_configurations(view),
        "## Provenance",
        bullets(f"{term}: {escape(text)}" for term, text in facts(view)),
        *([fence(str(view.provenance["command"]), "sh")] if view.provenance.get("command") else []),
        *_checks(view),
        "## How to read the numbers",
        bullets(f"**{term}**: {escape(text)}" for term, text in glossary(view)),
        *(["## Warnings", bullets(escape(w) for w in view.warnings)] if view.warnings else []),
    ]


def _decision(view: View) -> list[str | Table]:
    """Return the recommendation, what would help, the configurations beside it, and the table of leaders."""
    found = decision(view)
    if found is None:
        return []
    header = ["Leader", "Mean over skills", "Below the best", "Guarded tasks", "Cost"]
    rows = []
    for r in found.rows:
        guarded = [f"{d.task} {d.word} ({view.unit(d.task).diff(d.diff)})" for d in r.guarded]
        gap = f"{r.gap} ({r.verdict})" if r.verdict else r.gap
        pair = r.pair or {}
        rows.append(
            [
                f"{r.name} ({r.kind})" if r.kind else r.name,
                POINTS.cell(r.mean, r.value),
                POINTS.cell(gap, *(pair.get(key) for key in ("diff", "low", "high"))),
                ", ".join(guarded) or r.unguarded or MISSING,
                r.cost,
            ]
        )
    return [
        f"**{escape(found.text)}**",
        bullets([*(f"What would help: {escape(h)}" for h in found.help), *map(escape, found.details)]),
        *([Table("leaders", header, rows)] if rows else []),
        escape(found.family),
    ]


def bullets(lines: Iterable[str]) -> str:
    """Return a bulleted list of lines that are already escaped."""
    return "\n".join(f"- {line}" for line in lines)


def _summary(view: View) -> Table:
    """Return the summary table."""
    header = [
        "Configuration",
        "Role",
        "Mean over skills",
        *(_directed(t) for t in view.tasks),
        "Kept",
        f"Against {view.baseline}",
    ]
    return Table("summary", header, [_summary_row(view, c) for c in view.configurations], left=2)


def _summary_row(view: View, c: ConfigurationView) -> list[str]:
    rows = view.compared(c.name, view.tasks)
    verdicts = {v: sum(d.word == v for d in rows) for v in VERDICTS}
    role = ROLE_NOTES.get(c.role, "configuration")
    cells = [c.name, ", ".join(p for p in (role, wording.same_weights(c)) if p), _levels(c.mean)]
    for t in view.tasks:
        e = c.scores.get(t.name)
        cells.append(MISSING if e is None else t.unit.cell(t.unit.score(e.value), e.value, e.low, e.high))
    return [*cells, _percent(c.kept_mean), ", ".join(f"{n} {v}" for v, n in verdicts.items() if n) or MISSING]


def _directed(task: TaskView) -> str:
    return f"{task.name} (lower is better)" if task.lower else task.name


def _undecided(view: View) -> list[str | Table]:
    """Return the undecided comparisons with the smallest detectable difference, the items needed and the second metric."""
    if not view.undecided:
        return []
    rows = []
    for d in view.undecided:
        u = view.unit(d.task)
        needs = f"≈ {about(d.needs)}" if d.needs else "more clusters or fewer comparisons" if d.impossible else MISSING
        second = f"{d.companion.metric} {marks.companion(d.companion)}" if d.companion else MISSING
        difference = _with_ends(u, d.diff, d.low_adj, d.high_adj)
        detectable = u.cell(marks.detectable(d, u), None if d.impossible else d.mde)
        rows.append([d.configuration, d.task, d.verdict or MISSING, difference, detectable, _count(d.n), needs, second])
    header = [
        "Configuration",
        "Task",
        "Verdict",
        "Difference, adjusted interval",
        "Detectable",
        "Items",
        "Items needed",
        "Second metric",
    ]
    return ["### Undecided comparisons", Table("undecided", header, rows, left=3)]


def _forgetting(view: View) -> list[str | Table]:
    effects = [(c.name, c.forgetting) for c in view.configurations if c.forgetting]
    rows = [[name, _with_ends(POINTS, f.diff, f.low, f.high), f.verdict or MISSING] for name, f in effects]
    text = f"Mean over the retention tasks, configuration minus base, {wording.chance_correction(view, 'retention')}, in points."
    header = ["Configuration", "Forgetting", "Verdict"]
    return ["## Forgetting", escape(text), Table("forgetting", header, rows)] if rows else []


def _checks(view: View) -> list[str | Table]:
    rows = []
    for name, k in ((c.name, k) for c in view.configurations for k in c.checks):
        numbers = (Cell(small(v), {"": v}, "nats") for v in (k.max_difference, k.tolerance, k.spread))
        rows.append([name, k.suite or MISSING, k.scorer or MISSING, k.whole or name, _count(k.documents), *numbers])
    header = [
        "Configuration",
        "Suite",
        "Scorer",
        "Whole check on",
        "Documents",
        "Largest difference",
        "Tolerance",
        "Spread of hflm itself",
    ]
    return ["## Scorer check", escape(self_check(view)), *([Table("check", header, rows, left=4)] if rows else [])]


def differences(view: View) -> Table:
    """Return a table of all differences of the comparison."""
    header = [
        "Configuration",
        "Task",
        "Metric",
        "Score",
        view.baseline,
        "Difference",
        "95 % interval",
        "Adjusted interval",
        "p",
        "Adjusted p",
        "Items",
        "Clusters",
        "Detectable",
        "Second metric",
        "Verdict",
        *(["Family"] if view.families else []),
    ]
    rows = []
    for d in view.rows:
        u = view.unit(d.task, d.metric)
        rows.append(
            [
                d.configuration,
                d.task,
                d.metric + (" (lower is better)" if d.lower else ""),
                u.cell(u.score(d.value), d.value),
                u.cell(u.score(d.baseline_value), d.baseline_value),
                u.cell(u.diff(d.diff), d.diff),
                u.interval(d.low, d.high),
                u.interval(d.low_adj, d.high_adj),
                Cell(p_value(d.p), {"": d.p}),
                Cell(p_value(d.p_adj), {"": d.p_adj}),
                Cell(count(d.n), {"": d.n, "gained": d.wins, "lost": d.losses}),
                _count(d.clusters),
                u.cell(MISSING, None) if d.impossible else u.cell(u.score(d.mde), d.mde),
                _companion(d),
                marks.verdict_text(d),
                *([marks.family(d)] if view.families else []),
            ]
        )
    return Table("differences", header, rows, left=3)


def _interference(view: View) -> list[str | Table]:
    matrix = marks.interference(view)
    if not matrix.rows:
        return []
    text = "Score of each brick alone minus the base's, in points. " + wording.interference(view)
    return ["## Interference", escape(text), _matrix("interference", "Brick", matrix)]


def _matrix(name: str, corner: str, matrix: marks.Matrix) -> Table:
    """Return a matrix with the verdict beside each number."""
    words = {kind: word for word, kind in marks.CLASSES.items()}
    rows = []
    for label, cells in matrix.rows:
        texts = (f"{c.text} ({words.get(c.kind, MISSING)})" for c in cells)
        numbers = ({"": c.value, "low": c.low, "high": c.high} for c in cells)
        rows.append([label, *(Cell(t, n, c.unit) for t, n, c in zip(texts, numbers, cells, strict=True))])
    return Table(name, [corner, *matrix.columns], rows)


def _kept(view: View) -> list[str | Table]:
    """Return the table of kept skill, with the ratios that are withheld."""
    kept = [c for c in view.configurations if c.kept]
    tasks = [t.name for t in view.tasks if any(t.name in c.kept for c in kept)]
    if not kept:
        return []
    rows = [[c.name, _percent(c.kept_mean), *(_percent(c.kept.get(t)) for t in tasks)] for c in kept]
    return [
        "## Kept",
        "Chance-corrected score divided by that of the best parent alone, with its 95 % interval.",
        Table("kept", ["Configuration", "Mean", *tasks], rows),
        bullets(escape(f"{name} on {task}: withheld, {reason}.") for name, task, reason in view.withheld),
    ]


def _routed(document: Mapping[str, Any]) -> list[str | Table]:
    """Return who answered in routed configurations, and whether to merge or to route."""
    rows = [[routed.shown(cell) for cell in row] for row in routed.answered(document)]
    if not rows:
        return []
    sentences = [escape(text) for text in routed.advised(document)]
    return ["## Routing", *sentences, Table("routed", routed.HEADS, rows, left=3)]


def _edits(document: Mapping[str, Any], view: View) -> list[str | Table]:
    """Return the scores on edited facts and the survival of each edit."""
    parts: list[str | Table] = []
    for suite in edits.fact_suites(document, view):
        parts += [
            f"### {escape(suite.source or suite.name)}: {count(suite.facts)} facts",
            Table(f"facts-{suite.name}", *edits.markdown_rows(suite)),
        ]
        parts += [bullets(escape(written.sentence()) for written in suite.written)] if suite.written else []
        for number, survival in enumerate(suite.survivals, 1):
            parts += [
                f"### Survival of {escape(survival.alone)}",
                escape(survival.sentence()),
                Table(f"survival-{suite.name}-{number}", *edits.survival_rows(survival)),
            ]
        if suite.steps:
            parts += [
                f"### Facts added one after another: {escape(suite.source or suite.name)}",
                Table(f"sequence-{suite.name}", *edits.step_rows(suite), left=3),
            ]
    text = "Scores on the tasks of edited facts, in percent or the metric's own unit, with 95 % intervals over facts."
    return ["## Facts", text, *parts] if parts else []


def _flips(document: Mapping[str, Any], view: View) -> list[str | Table]:
    """Return the table of changed items by configuration and task."""
    counted = flips.counts(document, view)
    if not counted:
        return []
    tasks = [t.name for t in view.tasks if t.contrast is None]
    rows = []
    for name, row in counted.items():
        rows.append([name, *(_changed(row.get(t)) for t in tasks)])
    return [
        "## Changed items",
        "Items gained / lost. The HTML and JSON files list the items.",
        Table("changed-items", ["Configuration", *tasks], rows),
    ]


def _changed(k: flips.Count | None) -> str:
    if k is None or k == flips.Count():
        return MISSING
    return Cell(f"+{k.gained} / {MINUS}{k.lost}", {"gained": k.gained, "lost": k.lost, "same score": k.other})


def _configurations(view: View) -> list[str | Table]:
    """Return the table of configurations, the Pareto fronts, and the recipes."""
    parts: list[str | Table] = ["## Configurations"]
    rows = [
        [
            c.name,
            _bricks(c),
            Cell(amount(c.parameters), {"": c.parameters}),
            Cell(size(c.bytes), {"": c.bytes}),
            *(
                Cell(k.text, {"": k.value}, unit) if unit is not None else k.text
                for k, unit in zip(costs.cells(c.costs), COST_UNITS, strict=True)
            ),
            c.digest[:12],
        ]
        for c in view.configurations
    ]
    header = ["Configuration", "Bricks", "Parameters", "Bytes", *costs.HEADS, "Digest"]
    parts.append(Table("configurations", header, rows, left=2))
    if reasons := costs.unknown([{"name": c.name, "costs": c.costs} for c in view.configurations]):
        parts.append(escape(f"A dash: {'; '.join(reasons)}."))
    if view.axes:
        lines = [[brick, *(axes.get(n, MISSING).replace("_", " ") for n in view.axis_names)] for brick, axes in view.axes.items()]
        parts.append(Table("axes", ["Brick", *view.axis_names], lines, left=1 + len(view.axis_names)))
    for s in scatter.scatters(view):
        parts.append(escape(f"{s.title}, Pareto front (no other configuration is better on both): {listed(s.front)}."))
    for c in view.configurations:
        if c.recipe_text:
            parts += [f"### {escape(c.name)}", fence(c.recipe_text, "yaml")]
    return parts


def _bricks(c: ConfigurationView) -> str:
    sized = [name if n is None else f"{name} ({size(n)})" for name, n in c.bricks.items()]
    return ", ".join(sized or c.parents) or MISSING


def _levels(e: Estimate | None) -> str:
    return (
        MISSING
        if e is None
        else POINTS.cell(f"{POINTS.score(e.value)} {POINTS.levels(e.low, e.high)}".strip(), e.value, e.low, e.high)
    )


def _percent(e: Estimate | None) -> str:
    if e is None:
        return MISSING
    text = "withheld" if e.value is None else f"{PERCENT.score(e.value)} % {PERCENT.levels(e.low, e.high)}".strip()
    return PERCENT.cell(text, e.value, e.low, e.high)


def _with_ends(unit: Unit, diff: float | None, low: float | None, high: float | None) -> Cell:
    return unit.cell(f"{unit.diff(diff)} {unit.diffs(low, high)}".strip(), diff, low, high)


def _count(n: int | None) -> Cell:
    return Cell(count(n), {"": n})


def _companion(d: DifferenceView) -> str:
    if d.companion is None:
        return MISSING
    c = d.companion
    return c.unit.cell(f"{c.metric} {marks.companion(c)}", c.diff, c.low, c.high)
