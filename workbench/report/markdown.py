"""The report as Markdown: the same tables and sentences, without the items."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.report import flips, marks, wording
from workbench.report.facts import facts
from workbench.report.numbers import MINUS, MISSING, PERCENT, POINTS, count, p_value, seconds
from workbench.report.view import VERDICTS, Configuration, Estimate, View

ROLE_NOTES = {"base": "base", "brick": "brick alone", "average": "average"}


def markdown(document: Mapping[str, Any], view: View) -> str:
    """The whole report; user text is escaped so that it cannot open HTML, tables or code."""
    parts = [
        f"# {escape(wording.title(view))}",
        escape(wording.scope(view)),
        *(f"> **Control missing.** {escape(m)}" for m in wording.missing_controls(view)),
        *(escape(s) for s in wording.summary(view)),
        _bullets(f"**{escape(f.name)}**: {escape(f.text)}" for f in wording.findings(view)),
        "## Summary",
        _summary(view),
        "Scores in percent of items, the mean corrected for chance; brackets are 95 % intervals, those of "
        "differences are adjusted for the family.",
        *(f"No plain average of {escape(s)} was scored." for s in wording.without_average(view)),
        f"## Differences against {escape(view.baseline)}",
        _differences(view),
        *_interference(view),
        *_kept(view),
        *_flips(document, view),
        *_recipes(view),
        "## Provenance",
        _bullets(f"{term}: {escape(text)}" for term, text in facts(view)),
        *([fence(str(view.provenance["command"]), "sh")] if view.provenance.get("command") else []),
        "## How to read the numbers",
        _bullets(f"**{term}**: {escape(text)}" for term, text in wording.glossary(view)),
        *(["## Warnings", _bullets(escape(w) for w in view.warnings)] if view.warnings else []),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", text)


def fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of escaped cells; the first `left` columns are left-aligned, the others right-aligned."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    lines = [[escape(h) for h in header], rule, *([escape(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _summary(view: View) -> str:
    header = ["Configuration", "Role", "Mean over skills", *(t.name for t in view.tasks), "Kept"]
    header += [f"{t.name}, difference" for t in view.retention] + [f"Against {view.baseline}"]
    return table(header, (_summary_row(view, c) for c in view.configurations), left=2)


def _summary_row(view: View, c: Configuration) -> list[str]:
    found = view.compared(c.name, view.tasks)
    verdicts = {v: sum(d.word == v for d in found) for v in VERDICTS}
    cells = [c.name, ROLE_NOTES.get(c.role, "configuration"), _levels(c.mean)]
    cells += [t.unit.score(c.scores[t.name].value) if t.name in c.scores else MISSING for t in view.tasks]
    cells.append(_percent(c.kept_mean))
    for task in view.retention:
        d = view.differences.get((c.name, task.name))
        cells.append(f"{task.unit.diff(d.diff)} {task.unit.diffs(d.low_adj, d.high_adj)}".strip() if d else MISSING)
    return [*cells, ", ".join(f"{n} {v}" for v, n in verdicts.items() if n) or MISSING]


def _differences(view: View) -> str:
    header = [
        "Configuration",
        "Task",
        "Metric",
        "Score",
        view.baseline,
        "Difference",
        "95 % interval",
        "Adjusted",
        "p",
        "p adjusted",
        "Items",
        "Clusters",
        "Detectable",
        "Verdict",
    ]
    rows = []
    for d in view.rows:
        u = view.unit(d.task, d.metric)
        rows.append(
            [
                d.configuration,
                d.task,
                d.metric,
                u.score(d.value),
                u.score(d.baseline_value),
                u.diff(d.diff),
                u.diffs(d.low, d.high),
                u.diffs(d.low_adj, d.high_adj),
                p_value(d.p),
                p_value(d.p_adj),
                count(d.n),
                count(d.clusters),
                u.score(d.mde),
                marks.verdict_text(d),
            ]
        )
    return table(header, rows, left=3)


def _interference(view: View) -> list[str]:
    matrix = marks.interference(view)
    if not matrix.rows:
        return []
    words = {v: k for k, v in marks.CLASSES.items()}
    rows = [[name, *(f"{c.text} ({words.get(c.kind, MISSING)})" for c in cells)] for name, cells in matrix.rows]
    text = "Each brick alone minus the base, in points. " + wording.interference(view)
    return ["## Interference", escape(text), table(["Brick", *matrix.columns], rows)]


def _kept(view: View) -> list[str]:
    kept = [c for c in view.configurations if c.kept]
    tasks = [t.name for t in view.tasks if any(t.name in c.kept for c in kept)]
    if not kept:
        return []
    rows = [[c.name, _percent(c.kept_mean), *(_percent(c.kept.get(t)) for t in tasks)] for c in kept]
    return [
        "## Kept",
        "Chance-corrected score over that of the best parent alone, with 95 % interval.",
        table(["Configuration", "Mean", *tasks], rows),
    ]


def _flips(document: Mapping[str, Any], view: View) -> list[str]:
    counted = flips.counts(document, view)
    if not counted:
        return []
    tasks = [t.name for t in view.tasks]
    rows = []
    for name, row in counted.items():
        cells = [row.get(t, flips.Count()) for t in tasks]
        rows.append([name, *(f"+{k.gained} / {MINUS}{k.lost}" if k != flips.Count() else MISSING for k in cells)])
    return [
        "## Changed items",
        "Items gained / lost. The items stand in the HTML and JSON files.",
        table(["Configuration", *tasks], rows),
    ]


def _recipes(view: View) -> list[str]:
    parts = ["## Recipes"]
    rows = [[c.name, ", ".join(c.parents) or MISSING, seconds(c.seconds), c.digest[:12]] for c in view.configurations]
    parts.append(table(["Configuration", "Bricks", "Seconds", "Digest"], rows, left=2))
    for c in view.configurations:
        if c.recipe_text:
            parts += [f"### {escape(c.name)}", fence(c.recipe_text, "yaml")]
    return parts


def _levels(e: Estimate | None) -> str:
    return MISSING if e is None else f"{POINTS.score(e.value)} {POINTS.levels(e.low, e.high)}".strip()


def _percent(e: Estimate | None) -> str:
    return MISSING if e is None else f"{PERCENT.score(e.value)} % {PERCENT.levels(e.low, e.high)}".strip()
