"""The report as Markdown: the page's tables and sentences, without the items."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.compare.configurations import ComparedConfiguration, Level
from workbench.compare.differences import VERDICTS
from workbench.compare.kept import Kept
from workbench.report import decision, edits, items, marks, scatter, sweeps, wording
from workbench.report.numbers import MINUS, MISSING, PERCENT, POINTS, about, amount, count, listed, p_value, size, small, unit_of
from workbench.report.provenance import checks, facts, glossary, self_check
from workbench.tables import as_markdown as escape
from workbench.tables import fence
from workbench.tables import markdown_table as table

ROLE_NOTES = {
    "base": "base",
    "brick": "brick alone",
    "average": "average",
    "memory": "facts in the prompt",
    "finetune": "fine-tuned on the facts",
    "adapter": "LoRA on the facts and paraphrases",
}


def markdown(view: Comparison) -> str:
    """Return the whole report; text from users is escaped, so that it cannot start HTML, tables or code."""
    parts = [
        f"# {escape(wording.title(view))}",
        *_decision(view),
        *_sweeps(view),
        *([f"**{escape(' '.join(losses))}**"] if (losses := wording.harm(view)) else []),
        escape(wording.scope(view)),
        *([f"> **{escape(view.partial)}**"] if view.partial else []),
        *(f"> **Control missing.** {escape(m)}" for m in wording.missing_controls(view)),
        *map(escape, wording.sentences(view)),
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
        bullets(f"{term}: {escape(text)}" for term, text in facts(view)),
        *([fence(view.provenance.command, "sh")] if view.provenance.command else []),
        *_checks(view),
        "## How to read the numbers",
        bullets(f"**{term}**: {escape(text)}" for term, text in glossary(view)),
        *(["## Warnings", bullets(escape(w) for w in view.warnings)] if view.warnings else []),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _decision(view: Comparison) -> list[str]:
    """Return the recommendation, what would help, the configurations beside it, and the table of leaders."""
    found, leaders = view.recommendation, decision.leaders(view)
    if not found or not leaders:
        return []
    header = ["Leader", "Mean over skills", "Below the best", "Guarded tasks", "Cost"]
    rows = []
    for r in leaders.rows:
        guarded = [f"{d.task} {d.verdict} ({unit_of(view, d.task).diff(d.diff)})" for d in r.guarded]
        pair = r.candidate.against_best
        rows.append(
            [
                f"{r.name} ({r.kind})" if r.kind else r.name,
                POINTS.score(r.candidate.mean),
                f"{r.gap} ({pair.verdict})" if pair else r.gap,
                ", ".join(guarded) or r.unguarded or MISSING,
                r.cost,
            ]
        )
    return [
        f"**{escape(found.text)}**",
        bullets([*(f"What would help: {escape(h)}" for h in found.help), *map(escape, found.details)]),
        *([table(header, rows)] if rows else []),
        escape(leaders.family),
    ]


def _sweeps(view: Comparison) -> list[str]:
    """Return one table for each measure of each sweep."""
    parts = []
    for grid in sweeps.grids(view):
        if not grid.across:
            parts.append(escape(sweeps.sentence(grid)))
            continue
        for measure in grid.measures:
            head, rows = grid.table(measure)
            over = f", mean over {grid.seeds} seeds" if grid.seeds > 1 else ""
            parts += [f"## Sweep of {escape(grid.name)}: {escape(measure.text)}{over}", table(head, rows)]
            if measure.baseline is not None:
                parts.append(
                    f"{escape(view.baseline)}: {grid.unit(measure).score(measure.baseline)}. Brackets are 95 % intervals."
                )
    return parts


def bullets(lines: Iterable[str]) -> str:
    """Return a bulleted list of lines that are already escaped."""
    return "\n".join(f"- {line}" for line in lines)


def _summary(view: Comparison) -> str:
    """Return the summary table."""
    header = [
        "Configuration",
        "Role",
        "Mean over skills",
        *(_directed(t) for t in view.tasks),
        "Kept",
        f"Against {view.baseline}",
    ]
    return table(header, (_summary_row(view, c) for c in view.by_role), left=2)


def _summary_row(view: Comparison, c: ComparedConfiguration) -> list[str]:
    rows = view.compared(c.name, view.tasks)
    verdicts = {v: sum(d.verdict == v for d in rows) for v in VERDICTS}
    role = ROLE_NOTES.get(c.role, "configuration")
    cells = [c.name, ", ".join(p for p in (role, wording.same_weights(c)) if p), _levels(c.mean)]
    cells += [unit_of(view, t.name).score(c.scores[t.name].value) if t.name in c.scores else MISSING for t in view.tasks]
    return [*cells, _percent(c.kept_mean), ", ".join(f"{n} {v}" for v, n in verdicts.items() if n) or MISSING]


def _directed(task: ComparedTask) -> str:
    return f"{task.name} (lower is better)" if task.lower else task.name


def _undecided(view: Comparison) -> list[str]:
    """Return the undecided comparisons with the smallest detectable difference, the items needed and the second metric."""
    if not view.undecided:
        return []
    rows = []
    for d in view.undecided:
        u = unit_of(view, d.task)
        needs = f"≈ {about(d.needed)}" if d.needed else "more clusters or fewer comparisons" if d.impossible else MISSING
        second = f"{d.companion.metric} {marks.companion(d.companion)}" if d.companion else MISSING
        difference = f"{u.diff(d.diff)} {u.diffs(d.low_adj, d.high_adj)}".strip()
        rows.append([d.configuration, d.task, d.verdict, difference, marks.detectable(d, u), count(d.n), needs, second])
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
    return ["### Undecided comparisons", table(header, rows, left=3)]


def _forgetting(view: Comparison) -> list[str]:
    effects = [(c.name, c.forgetting) for c in view.by_role if c.forgetting]
    rows = [[name, f"{POINTS.diff(f.diff)} {POINTS.diffs(f.low, f.high)}".strip(), f.verdict or MISSING] for name, f in effects]
    text = f"Mean over the retention tasks, configuration minus base, {wording.chance_correction(view, 'retention')}, in points."
    return ["## Forgetting", escape(text), table(["Configuration", "Forgetting", "Verdict"], rows)] if rows else []


def _checks(view: Comparison) -> list[str]:
    rows = []
    for row in checks(view):
        name, k = row.configuration, row.check
        numbers = (small(v) for v in (k.max_difference, k.tolerance, k.spread))
        rows.append([name, row.suite, k.scorer, k.whole or name, count(k.documents), *numbers])
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
    return ["## Scorer check", escape(self_check(view)), *([table(header, rows, left=4)] if rows else [])]


def differences(view: Comparison) -> str:
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
                u.score(d.value),
                u.score(d.baseline_value),
                u.diff(d.diff),
                u.diffs(d.low, d.high),
                u.diffs(d.low_adj, d.high_adj),
                p_value(d.p),
                p_value(d.p_adj),
                count(d.n),
                count(d.clusters),
                MISSING if d.impossible else u.score(d.mde),
                f"{d.companion.metric} {marks.companion(d.companion)}" if d.companion else MISSING,
                marks.verdict_text(d),
                marks.family(d),
            ]
        )
    return table(header, rows, left=3)


def _interference(view: Comparison) -> list[str]:
    matrix = marks.interference(view)
    if not matrix.rows:
        return []
    words = {v: k for k, v in marks.CLASSES.items()}
    rows = [[name, *(f"{c.text} ({words.get(c.kind, MISSING)})" for c in cells)] for name, cells in matrix.rows]
    text = "Score of each brick alone minus the base's, in points. " + wording.interference(view)
    return ["## Interference", escape(text), table(["Brick", *matrix.columns], rows)]


def _kept(view: Comparison) -> list[str]:
    """Return the table of kept skill, with the ratios that are withheld."""
    kept = [c for c in view.by_role if c.kept]
    tasks = [t.name for t in view.tasks if any(t.name in c.kept for c in kept)]
    if not kept:
        return []
    rows = [[c.name, _percent(c.kept_mean), *(_percent(c.kept.get(t)) for t in tasks)] for c in kept]
    return [
        "## Kept",
        "Chance-corrected score divided by that of the best parent alone, with its 95 % interval.",
        table(["Configuration", "Mean", *tasks], rows),
        bullets(escape(f"{name} on {task}: withheld, {reason}.") for name, task, reason in view.withheld),
    ]


def _routed(view: Comparison) -> list[str]:
    """Return who answered in routed configurations, and whether to merge or to route."""
    rows = [[decision.share_text(cell) for cell in row] for row in decision.answered(view)]
    if not rows:
        return []
    sentences = [escape(text) for text in decision.advised(view)]
    return ["## Routing", *sentences, table(decision.ROUTED_HEADS, rows, left=3)]


def _edits(view: Comparison) -> list[str]:
    """Return the scores on edited facts and the survival of each edit."""
    parts = []
    for suite in edits.fact_suites(view):
        parts += [
            f"### {escape(suite.source or suite.name)}: {count(suite.facts)} facts",
            table(*edits.markdown_rows(suite, view)),
        ]
        parts += [bullets(map(escape, suite.written))] if suite.written else []
        for survival in suite.survivals:
            parts += [
                f"### Survival of {escape(survival.alone)}",
                escape(survival.sentence()),
                table(*edits.survival_rows(survival)),
            ]
        if suite.steps:
            parts += [
                f"### Facts added one after another: {escape(suite.source or suite.name)}",
                table(*edits.step_rows(suite), left=3),
            ]
    text = "Scores on the tasks of edited facts, in percent or the metric's own unit, with 95 % intervals over facts."
    return ["## Facts", text, *parts] if parts else []


def _flips(view: Comparison) -> list[str]:
    """Return the table of changed items by configuration and task."""
    counted = items.counts(view)
    if not counted:
        return []
    tasks = [t.name for t in view.tasks if t.contrast is None]
    rows = []
    for name, row in counted.items():
        cells = [row.get(t, items.Count()) for t in tasks]
        rows.append([name, *(f"+{k.gained} / {MINUS}{k.lost}" if k != items.Count() else MISSING for k in cells)])
    return [
        "## Changed items",
        "Items gained / lost. The HTML and JSON files list the items.",
        table(["Configuration", *tasks], rows),
    ]


def _configurations(view: Comparison) -> list[str]:
    """Return the table of configurations, the Pareto fronts, and the recipes."""
    parts = ["## Configurations"]
    rows = [
        [
            c.name,
            _bricks(c),
            amount(c.parameters),
            size(c.bytes),
            *(cell.text for cell in decision.cost_cells(c.costs)),
            c.digest[:12],
        ]
        for c in view.by_role
    ]
    parts.append(table(["Configuration", "Bricks", "Parameters", "Bytes", *decision.COST_HEADS, "Digest"], rows, left=2))
    if reasons := decision.unknown_costs({c.name: c.costs for c in view.by_role}):
        parts.append(escape(f"A dash: {'; '.join(reasons)}."))
    if view.axes:
        lines = [[brick, *(axes.get(n, MISSING).replace("_", " ") for n in view.axis_names)] for brick, axes in view.axes.items()]
        parts.append(table(["Brick", *view.axis_names], lines, left=1 + len(view.axis_names)))
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
    return MISSING if e is None else f"{POINTS.score(e.value)} {POINTS.levels(e.low, e.high)}".strip()


def _percent(e: Kept | None) -> str:
    if e is None:
        return MISSING
    return "withheld" if e.value is None else f"{PERCENT.score(e.value)} % {PERCENT.levels(e.low, e.high)}".strip()
