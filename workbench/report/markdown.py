"""The report as Markdown: the page's tables and sentences, without the items."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.compare.comparison import Comparison
from workbench.compare.configurations import ComparedConfiguration, Level
from workbench.compare.differences import VERDICTS, Difference
from workbench.compare.kept import Kept
from workbench.ground.numbers import MINUS, MISSING, about, amount, count, listed, p_value, size, small
from workbench.ground.tables import Cell, Table, fence, prose
from workbench.ground.tables import as_markdown as escape
from workbench.report import decision, edits, items, marks, methods, scatter, sweeps, wording
from workbench.report.numbers import NATS, PERCENT, POINTS, counted, unit_of
from workbench.report.provenance import checks, facts, glossary, self_check

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


def markdown(view: Comparison) -> str:
    """Return the whole report; text from users is escaped, so that it cannot start HTML, tables or code."""
    return text_of(_parts(view))


def tables(view: Comparison) -> list[Table]:
    """Return the report's tables, and the matrix of differences, which the report has as rows."""
    matrix = marks.differences(view)
    found = [part for part in _parts(view) if isinstance(part, Table)]
    return [*found, *([_matrix("difference-matrix", "Configuration", matrix)] if matrix.rows else [])]


def text_of(parts: Iterable[str | Table]) -> str:
    """Return the parts of a report as Markdown."""
    return "\n\n".join(p.markdown() if isinstance(p, Table) else p for p in parts if p) + "\n"


def _parts(view: Comparison) -> list[str | Table]:
    return [
        f"# {escape(wording.title(view))}",
        *_decision(view),
        *sweeps.tables(view),
        *([f"**{escape(' '.join(losses))}**"] if (losses := wording.harm(view)) else []),
        escape(wording.scope(view)),
        *([f"> **{prose(view.partial)}**"] if view.partial else []),
        *(f"> **Control missing.** {prose(m)}" for m in wording.missing_controls(view)),
        *map(prose, wording.sentences(view)),
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
        *_edits(view),
        *_routed(view),
        *_flips(view),
        *_configurations(view),
        "## Provenance",
        bullets(f"{term}: {prose(text)}" for term, text in facts(view)),
        *([fence(view.provenance.command, "sh")] if view.provenance.command else []),
        *_checks(view),
        "## Methods, for a paper",
        escape(methods.paragraph(view)),
        fence(methods.bibtex(view), "bibtex"),
        "## How to read the numbers",
        bullets(f"**{term}**: {prose(text)}" for term, text in glossary(view)),
        *(["## Warnings", bullets(map(prose, view.warnings))] if view.warnings else []),
    ]


def _decision(view: Comparison) -> list[str | Table]:
    """Return the recommendation, what would help, the configurations beside it, and the table of leaders."""
    found, leaders = view.recommendation, decision.leaders(view)
    if not found or not leaders:
        return []
    header = ["Leader", "Mean over skills", "Below the best", "Guarded tasks", "Cost"]
    rows = []
    for r in leaders.rows:
        guarded = [f"{d.task} {d.verdict} ({unit_of(view, d.task).worded(d.diff)})" for d in r.guarded]
        pair = r.candidate.against_best
        gap = f"{r.gap} ({pair.verdict})" if pair else r.gap
        rows.append(
            [
                f"{r.name} ({r.kind})" if r.kind else r.name,
                POINTS.cell(POINTS.score(r.candidate.mean), r.candidate.mean),
                POINTS.cell(gap, *((pair.diff, pair.low, pair.high) if pair else (None, None, None))),
                ", ".join(guarded) or r.unguarded or MISSING,
                r.cost,
            ]
        )
    return [
        f"**{prose(found.text)}**",
        fence("\n".join(found.command), "sh") if found.command else "",
        bullets([*(f"What would help: {prose(h)}" for h in found.help), *map(prose, found.details)]),
        *([Table("leaders", header, rows)] if rows else []),
        escape(leaders.family),
    ]


def bullets(lines: Iterable[str]) -> str:
    """Return a bulleted list of lines that are already escaped."""
    return "\n".join(f"- {line}" for line in lines)


def _summary(view: Comparison) -> Table:
    """Return the summary table."""
    tasks = [f"{t.name} (lower is better)" if t.lower else t.name for t in view.tasks]
    header = ["Configuration", "Role", "Mean over skills", *tasks, "Kept", f"Against {view.baseline}"]
    return Table("summary", header, [_summary_row(view, c) for c in view.by_role], left=2)


def _summary_row(view: Comparison, c: ComparedConfiguration) -> list[str]:
    rows = view.compared(c.name, view.tasks)
    verdicts = {v: sum(d.verdict == v for d in rows) for v in VERDICTS}
    role = ROLE_NOTES.get(c.role, "configuration")
    cells = [c.name, ", ".join(p for p in (role, wording.same_weights(c)) if p), _levels(c.mean)]
    for t in view.tasks:
        unit, e = unit_of(view, t.name), c.scores.get(t.name)
        cells.append(MISSING if e is None else unit.cell(unit.score(e.value), e.value, e.low, e.high))
    return [*cells, _percent(c.kept_mean), ", ".join(f"{n} {v}" for v, n in verdicts.items() if n) or MISSING]


def _undecided(view: Comparison) -> list[str | Table]:
    """Return the undecided comparisons with the smallest detectable difference, the items needed and the second metric."""
    if not view.undecided:
        return []
    rows = []
    for d in view.undecided:
        u = unit_of(view, d.task)
        needs = f"≈ {about(d.needed)}" if d.needed else "more clusters or fewer comparisons" if d.impossible else MISSING
        second = f"{d.companion.metric} {marks.companion(d.companion)}" if d.companion else MISSING
        difference = u.with_ends(d.diff, d.low_adj, d.high_adj)
        detectable = u.cell(marks.detectable(d, u), None if d.impossible else d.mde)
        rows.append([d.configuration, d.task, d.verdict, difference, detectable, counted(d.n), needs, second])
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


def _forgetting(view: Comparison) -> list[str | Table]:
    effects = [(c.name, c.forgetting) for c in view.by_role if c.forgetting]
    rows = [[name, POINTS.with_ends(f.diff, f.low, f.high), f.verdict or MISSING] for name, f in effects]
    text = f"Mean over the retention tasks, configuration minus base, {wording.chance_correction(view, 'retention')}, in points."
    header = ["Configuration", "Forgetting", "Verdict"]
    return ["## Forgetting", escape(text), Table("forgetting", header, rows)] if rows else []


def _checks(view: Comparison) -> list[str | Table]:
    rows = []
    for row in checks(view):
        name, k = row.configuration, row.check
        numbers = (Cell(small(v), {"": v}, "nats") for v in (k.max_difference, k.tolerance, k.spread))
        rows.append([name, row.suite, k.scorer, k.whole or name, counted(k.documents), *numbers])
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


def differences(view: Comparison) -> Table:
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
        "Stands up to",
        "Family",
    ]
    rows = []
    for d in view.rows:
        u = unit_of(view, d.task)
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
                counted(d.clusters),
                u.cell(MISSING, None) if d.impossible else u.cell(u.score(d.mde), d.mde),
                _companion(d),
                marks.verdict_text(d),
                u.cell(u.score(d.stands_up_to), d.stands_up_to),
                marks.family(d),
            ]
        )
    return Table("differences", header, rows, left=3)


def _interference(view: Comparison) -> list[str | Table]:
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


def _kept(view: Comparison) -> list[str | Table]:
    """Return the table of kept skill, with the ratios that are withheld."""
    kept = [c for c in view.by_role if c.kept]
    tasks = [t.name for t in view.tasks if any(t.name in c.kept for c in kept)]
    if not kept:
        return []
    rows = [[c.name, _percent(c.kept_mean), *(_percent(c.kept.get(t)) for t in tasks)] for c in kept]
    return [
        "## Kept",
        "Chance-corrected score divided by that of the best parent alone, with its 95 % interval.",
        Table("kept", ["Configuration", "Mean", *tasks], rows),
        escape(wording.withheld(view)),
    ]


def _routed(view: Comparison) -> list[str | Table]:
    """Return who answered in routed configurations, and whether to merge or to route."""
    rows = [[decision.share_text(cell) for cell in row] for row in decision.answered(view)]
    if not rows:
        return []
    sentences = [escape(text) for text in decision.advised(view)]
    return ["## Routing", *sentences, Table("routed", decision.ROUTED_HEADS, rows, left=3)]


def _edits(view: Comparison) -> list[str | Table]:
    """Return the scores on edited facts and the survival of each edit."""
    parts: list[str | Table] = []
    for suite in edits.fact_suites(view):
        parts += [
            f"### {escape(suite.source or suite.name)}: {count(suite.facts)} facts",
            Table(f"facts-{suite.name}", *edits.markdown_rows(suite, view)),
        ]
        parts += [bullets(map(escape, suite.written))] if suite.written else []
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


def _flips(view: Comparison) -> list[str | Table]:
    """Return the table of changed items by configuration and task."""
    counted = items.counts(view)
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


def _changed(k: items.Count | None) -> str:
    if k is None or k == items.Count():
        return MISSING
    return Cell(f"+{k.gained} / {MINUS}{k.lost}", {"gained": k.gained, "lost": k.lost, "same score": k.other})


def _configurations(view: Comparison) -> list[str | Table]:
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
                for k, unit in zip(decision.cost_cells(c.costs), COST_UNITS, strict=True)
            ),
            c.digest[:12],
        ]
        for c in view.by_role
    ]
    header = ["Configuration", "Bricks", "Parameters", "Bytes", *decision.COST_HEADS, "Digest"]
    parts.append(Table("configurations", header, rows, left=2))
    if reasons := decision.unknown_costs({c.name: c.costs for c in view.by_role}):
        parts.append(escape(f"A dash: {'; '.join(reasons)}."))
    if view.axes:
        lines = [[brick, *(axes.get(n, MISSING).replace("_", " ") for n in view.axis_names)] for brick, axes in view.axes.items()]
        parts.append(Table("axes", ["Brick", *view.axis_names], lines, left=1 + len(view.axis_names)))
    for s in scatter.scatters(view):
        parts.append(escape(f"{s.title}, Pareto front (no other configuration is better on both): {listed(s.front)}."))
    for c in view.by_role:
        if c.recipe_text:
            parts += [f"### {escape(c.name)}", fence(c.recipe_text, "yaml")]
    return parts


def _bricks(c: ComparedConfiguration) -> str:
    sized = [name if n is None else f"{name} ({size(n)})" for name, n in c.bricks.items()]
    return ", ".join(sized or c.parents) or MISSING


def _levels(e: Level | None) -> str:
    return (
        MISSING
        if e is None
        else POINTS.cell(f"{POINTS.score(e.value)} {POINTS.levels(e.low, e.high)}".strip(), e.value, e.low, e.high)
    )


def _percent(e: Kept | None) -> str:
    if e is None:
        return MISSING
    text = "withheld" if e.value is None else f"{PERCENT.score(e.value)} {PERCENT.levels(e.low, e.high)}".rstrip() + " %"
    return PERCENT.cell(text, e.value, e.low, e.high)


def _companion(d: Difference) -> str:
    if d.companion is None:
        return MISSING
    c = d.companion
    return NATS.cell(f"{c.metric} {marks.companion(c)}", c.diff, c.low, c.high)
