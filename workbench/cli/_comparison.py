"""A comparison on the terminal: recommendation, differences with verdicts, scores, edited facts, costs, sweeps, reasons for exit status 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from workbench.cli._output import out

if TYPE_CHECKING:
    from workbench.compare.comparison import ComparedTask, Comparison, Family
    from workbench.compare.configurations import ConfigurationCosts, Level
    from workbench.compare.differences import Difference
    from workbench.compare.kept import Kept
    from workbench.scores.groups import GroupScore
    from workbench.scores.store import Scores


# Verdict -> mark after a score. Other verdicts have no mark.
MARKS = {"better": " +", "worse": " -", "safe": " ~", "not shown safe": " !"}


def groups_table(groups: Sequence[tuple[str, GroupScore]]) -> None:
    """Print one row per configuration and aggregate of a group of tasks."""
    if groups:
        out.table(
            ["configuration", "group", "metric", "tasks", "n", "score"],
            [[name, g.alias, _filtered(g), str(g.tasks), str(g.n), f"{g.value:.4f}"] for name, g in groups],
            right=(3, 4, 5),
        )
        if not all(g.weighted for _, g in groups):
            out.say("groups: mean over items if tasks are weighted by size, mean over tasks if not (weight_by_size: false)")


def _filtered(group: GroupScore) -> str:
    return group.metric if group.filter == "none" else f"{group.metric},{group.filter}"


def scores_table(comparison: Comparison | None, scores: list[Scores]) -> None:
    """Print one row per configuration: primary scores with intervals, and marks for the comparison's verdicts."""
    if comparison is None:
        out.table(
            ["configuration", "task", "metric", "n", "score", "95 %"],
            [
                [s.configuration.name, task, metric, str(t.n), f"{m.value:.3f}", f"{m.low:.3f}-{m.high:.3f}"]
                for s in scores
                for task, t in s.tasks.items()
                for metric, m in t.metrics.items()
            ],
            right=(3, 4, 5),
        )
        return
    verdict = {(r.configuration, r.task): r.verdict for r in comparison.rows}
    rows = []
    for c in comparison.configurations:
        cells = [c.name, _interval(c.mean)]
        for task in comparison.tasks:
            found = c.scores.get(task.task)
            mark = MARKS.get(verdict.get((c.name, task.task), ""), "  ")
            cells.append(_interval(found, task.share) + mark if found else "")
        cells.append("withheld" if c.kept_mean and c.kept_mean.reason else _interval(c.kept_mean))
        rows.append(cells)
    heads = ["configuration", "mean", *(_head(t) for t in comparison.tasks), "kept"]
    out.table(heads, rows, right=range(1, len(heads)))
    family = comparison.family
    guarded = "; ~ safe, ! not shown safe (guarded tasks)" if comparison.harm_tested else ""
    out.say(
        f"scores in %{own_units(comparison.tasks)}, 95 % intervals; mean over skills, {_corrected(comparison.tasks)}; kept: share of the best "
        f"parents' skills; + better, - worse than {comparison.baseline}{guarded} ({correction(family)}: {families_text(family)})"
    )
    for c in comparison.configurations:
        for task_name, share in c.kept.items():
            if share.reason:
                out.say(f"kept: {c.name} on {task_name} is withheld: {share.reason}")
        if c.aliases:
            out.say(f"{c.name}: same weights as {', '.join(c.aliases)}")
    say_harm(comparison)
    if comparison.facts:
        _edited_facts(comparison)
    for warning in comparison.warnings:
        out.warn(warning)


def _edited_facts(comparison: Comparison) -> None:
    """Print results of sequential edits as a table, and sentences on generated answers and on the facts that survive."""
    from workbench.report.edits import fact_suites, step_rows

    for suite in fact_suites(comparison):
        if suite.steps:
            heads, rows = step_rows(suite)
            out.table(heads, rows, right=range(3, len(heads)))
        for written in suite.written:
            out.say(f"{suite.source}: {written}")
        for left in suite.survivals:
            out.say(f"{suite.source}: {left.sentence()}")


def _head(task: ComparedTask) -> str:
    sign = ", lower is better" if task.lower else ""
    return f"{task.task} (n={task.n}{sign})"


def _corrected(tasks: Sequence[ComparedTask]) -> str:
    """Return a phrase that says whether the mean over skills is corrected for chance, and on which tasks it is not."""
    bare = [t.task for t in tasks if t.role == "skill" and t.chance is None]
    if not bare:
        return "chance-corrected"
    return (
        f"chance-corrected except on {', '.join(bare)}"
        if len(bare) < sum(t.role == "skill" for t in tasks)
        else "not corrected for chance"
    )


def _interval(found: Level | Kept | None, share: bool = True) -> str:
    if found is None or found.value is None:
        return ""
    text, low, high = (number(value, share, digits=0) for value in (found.value, found.low, found.high))
    return f"{text} [{low}, {high}]" if low and high else text


def costs_table(costs: Sequence[ConfigurationCosts]) -> None:
    """Print one row per configuration, and below the table why a number is not known."""
    from workbench.report.decision import COST_HEADS, cost_cells, unknown_costs

    out.line("")
    out.table(
        ["configuration", *(head.lower() for head in COST_HEADS)],
        [[c.configuration, *(cell.text for cell in cost_cells(c))] for c in costs],
        right=range(1, len(COST_HEADS)),
    )
    counted = list(dict.fromkeys(c.peak_of for c in costs if c.peak_of))
    if counted:
        out.say(f"peak memory while a task is scored: {'; '.join(counted)}")
    for sentence in unknown_costs({c.configuration: c for c in costs}):
        out.say(sentence)


def sweep_tables(comparison: Comparison) -> None:
    """Print the sweeps of a comparison: mean over skills and retention with intervals, by the swept values."""
    from workbench.report.sweeps import grids, sentence

    for grid in grids(comparison):
        if not grid.across:
            out.line(sentence(grid))
            continue
        for measure in grid.measures:
            head, rows = grid.table(measure)
            seeds = f", mean over {grid.seeds} seeds" if grid.seeds > 1 else ""
            out.heading(f"sweep {grid.name}: {measure.text}{seeds}")
            out.table(head, rows, right=range(1, len(head)))
            if measure.baseline is not None:
                out.say(f"{comparison.baseline}: {grid.unit(measure).score(measure.baseline)}")
        out.line("")


STYLES = {"better": "green", "worse": "red", "safe": "green", "not shown safe": "yellow"}
"""Verdict -> color on a terminal. Other verdicts have none."""


def recommended(comparison: Comparison) -> None:
    """Print the recommendation on stdout: what to ship and why, or why nothing and what would help."""
    found = comparison.recommendation
    if not found:
        return
    for line in wrap(found.text, out.width):
        out.colored([(line, "bold green" if found.configuration else "bold yellow")])
    for text in (*(f"what would help: {one}" for one in found.help), *found.details):
        for line in wrap(text, out.width, initial_indent="  ", subsequent_indent="  "):
            out.line(line)
    out.line("")


def rows_table(comparison: Comparison, pair: tuple[str, str] | None = None) -> None:
    """Print one row per configuration and task: difference, intervals, verdict, and the margin beside "cannot tell".

    Where the table is wider than the terminal, each configuration gets a block of its own, without the columns that do not fit.

    Args:
        comparison: The comparison.
        pair: Names of the baseline and of the only configuration to print, whose scores are then printed too; default: all.
    """
    rows = [r for r in comparison.rows if pair is None or r.configuration == pair[1]]
    tasks = {t.task: t for t in comparison.tasks}
    beside = any(r.verdict == "cannot tell" and r.companion for r in rows)
    columns = {key: (head, [make(r, tasks[r.task].share) for r in rows]) for key, (head, make) in _columns(pair, beside).items()}
    if pair is not None:
        out.heading(f"{pair[1]} against {pair[0]}")
    if _width(columns) <= out.width:
        _table(columns)
    elif pair is not None:
        _block(columns, rows, tasks)
    else:
        names = list(dict.fromkeys(r.configuration for r in rows))
        for name in names:
            if name != names[0]:
                out.line("")
            own = [i for i, r in enumerate(rows) if r.configuration == name]
            out.heading(name)
            part = {k: (head, [cells[i] for i in own]) for k, (head, cells) in columns.items() if k != "configuration"}
            _block(part, [rows[i] for i in own], tasks)
    family = comparison.family
    out.say(
        f"differences in points{own_units(comparison.tasks)} against {comparison.baseline}; {family.text}; "
        f"{correction(family)} at {family.alpha:g}: {families_text(family)}"
    )
    if lower := [name for name, t in tasks.items() if t.lower]:
        out.say(f"lower is better: {', '.join(lower)}")
    if beside:
        out.say("margin: lead of the right choice over the other choices; tested separately, it does not change a verdict")
    say_harm(comparison)


_LEFT = ("configuration", "task", "metric", "verdict", "margin")
_DROPPED = ("margin", "plain", "metric", "n", "p")
"""Columns that a block leaves out where it is wider than the terminal, in this order."""
Columns = Mapping[str, tuple[str, Sequence[str]]]
"""Key -> head and cells of a column."""


def _columns(pair: tuple[str, str] | None, beside: bool) -> dict[str, tuple[str, Callable[[Difference, bool], str]]]:
    """Return the columns of the table of differences: key -> head, and the cell of a row given whether scores are shares."""
    columns: dict[str, tuple[str, Callable[[Difference, bool], str]]] = {
        "configuration": ("configuration", lambda r, _: r.configuration),
        "task": ("task", lambda r, _: r.task),
        "metric": ("metric", lambda r, _: r.metric),
    }
    if pair is not None:
        del columns["configuration"]
        columns["before"] = (pair[0], lambda r, share: number(r.baseline_value, share))
        columns["after"] = (pair[1], lambda r, share: number(r.value, share))
    columns |= {
        "diff": ("diff", lambda r, share: signed(r.diff, share)),
        "plain": ("95 %", lambda r, share: span(r.low, r.high, share)),
        "adjusted": ("adjusted", lambda r, share: span(r.low_adj, r.high_adj, share)),
        "p": ("p adj", lambda r, _: "" if r.p_adj is None else f"{r.p_adj:.3g}"),
        "n": ("n", lambda r, _: str(r.n)),
        "verdict": ("verdict", _verdict),
    }
    if beside:
        columns["margin"] = ("margin in nats, 95 %", lambda r, _: _companion(r))
    return columns


def _width(columns: Columns) -> int:
    """Return the width of a table with two blanks between its columns."""
    return sum(max(map(len, (head, *cells))) for head, cells in columns.values()) + 2 * (len(columns) - 1)


def _table(columns: Columns) -> None:
    """Print columns as a table, the verdicts in color on a terminal."""
    keys = list(columns)
    out.table(
        [head for head, _ in columns.values()],
        zip(*(cells for _, cells in columns.values()), strict=True),
        right=[i for i, key in enumerate(keys) if key not in _LEFT],
        style=lambda i, cell: _style(cell) if keys[i] == "verdict" else "",
    )


def _style(cell: str) -> str:
    """Return the color of a verdict, whatever is said after its word."""
    return next((style for word, style in STYLES.items() if cell.startswith(word)), "")


def _block(columns: Columns, rows: Sequence[Difference], tasks: Mapping[str, ComparedTask]) -> None:
    """Print the rows of one configuration within the terminal's width, and what its verdicts add in lines below."""
    shown = {**columns, "verdict": ("verdict", [str(r.verdict) for r in rows])}
    for key in _DROPPED:
        if _width(shown) > out.width:
            shown.pop(key, None)
    _table(shown)
    for r in rows:
        if facts := _facts(r, tasks[r.task].share):
            out.line(f"  {r.task}: {', '.join(facts)}")
        if "margin" in columns and "margin" not in shown and (margin := _companion(r)):
            out.line(f"  {r.task}: margin in nats {margin}")


def say_harm(comparison: Comparison) -> None:
    """Print sentences on losses and safety of guarded tasks, on rows that can get no verdict, and on whether to merge or to route."""
    from workbench.report import wording
    from workbench.report.decision import advised

    for text in (*wording.sentences(comparison), *advised(comparison)):
        out.say(text)


def gate_lines(worse: Sequence[Difference], not_safe: Sequence[Difference], baseline: str) -> list[str]:
    """Return the reasons for exit status 3, one line per configuration.

    Args:
        worse: Rows whose verdict is "worse".
        not_safe: Rows that --require-safe refuses; may include rows of `worse`.
        baseline: Name of the baseline.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for row in (*worse, *(r for r in not_safe if r.verdict != "worse")):
        said = f"is worse than {baseline} on" if row.verdict == "worse" else f"is {row.verdict} (--require-safe) on"
        lines.setdefault((row.configuration, said), []).append(row.task)
    return [f"exit status 3: {name} {said} {', '.join(tasks)}" for (name, said), tasks in lines.items()]


def _verdict(row: Difference, share: bool) -> str:
    """Return a row's verdict with what it adds, in parentheses."""
    facts = _facts(row, share)
    return str(row.verdict) + (f" ({', '.join(facts)})" if facts else "")


def _facts(row: Difference, share: bool) -> list[str]:
    """Return the tolerance of a row's verdict; of an undecided one also the smallest detectable effect, items needed and reason."""
    facts: list[str] = []
    reason = row.reason or ""
    if row.tolerance is not None and row.verdict != "no item changed":
        facts.append(f"tolerance {number(row.tolerance, share)}")
    if reason.startswith("too few clusters"):
        facts.append(reason.split(",")[0])
    if row.impossible:
        facts.append("no difference can be significant: more clusters or fewer comparisons are needed")
    if reason.startswith("the suite gives no tolerance"):
        facts.append("no tolerance")
    if row.verdict == "cannot tell" and row.mde is not None and not row.impossible:
        facts.append(f"mde {number(row.mde, share)}")
    if row.needed and row.verdict in ("cannot tell", "not shown safe"):
        facts.append(f"needs about n = {row.needed}")
    return facts


def _companion(row: Difference) -> str:
    margin = row.companion
    if not margin or row.verdict != "cannot tell":
        return ""
    return f"{margin.diff or 0:+.3f} {span(margin.low, margin.high, False)}, p {margin.p or 0:.2g}"


def own_units(tasks: Sequence[ComparedTask]) -> str:
    """Return a note that names the tasks whose scores are not in percent or points."""
    own = [t.task for t in tasks if not t.share]
    return f" (of {', '.join(own)} in the metric's own units)" if own else ""


def correction(family: Family) -> str:
    return "step-down max-T" if family.correction == "max-t" else "no correction"


def families_text(family: Family) -> str:
    """Return the number of rows of each family, in words."""
    from workbench.report.provenance import families

    return families(family)


def number(value: float | None, share: bool, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{100 * value:.{digits}f}" if share else f"{value:.4g}"


def signed(value: float | None, share: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:+.1f}" if share else f"{value:+.3g}"


def span(low: float | None, high: float | None, share: bool) -> str:
    return "" if low is None or high is None else f"[{signed(low, share)}, {signed(high, share)}]"
