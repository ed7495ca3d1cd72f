"""A comparison on the terminal: recommendation, differences with verdicts, scores, edited facts, costs, sweeps, reasons for exit status 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from workbench.console.output import out
from workbench.ground.numbers import about
from workbench.report.numbers import NATS, PERCENT, POINTS, Unit, unit_of

if TYPE_CHECKING:
    from workbench.compare.comparison import ComparedTask, Comparison
    from workbench.compare.configurations import ComparedConfiguration, ConfigurationCosts, Level
    from workbench.compare.differences import Difference
    from workbench.compare.kept import Kept
    from workbench.scores.groups import GroupScore
    from workbench.scores.store import Scores


# Verdict -> mark after a score. Other verdicts have no mark.
MARKS = {"better": " +", "worse": " \N{MINUS SIGN}", "safe": " ~", "not shown safe": " !"}
BEST = 5
"""Named configurations in the table of scores; of more, only the best are shown, beside the baseline."""


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
    from workbench.report.wording import withheld

    shown = _best(comparison)
    columns: dict[str, tuple[str, list[str]]] = {
        "configuration": ("configuration", [c.name for c in shown]),
        "mean": ("mean", [_interval(c.mean, POINTS) for c in shown]),
    }
    kept = ["withheld" if c.kept_mean and c.kept_mean.reason else _interval(c.kept_mean, PERCENT) for c in shown]
    whole = {**columns, **_task_columns(comparison, shown, ends=True), "kept": ("kept", kept)}
    forms = [whole, *([_turned(whole)] if len(whole) > len(shown) else [])]
    bare = {**columns, **_task_columns(comparison, shown, ends=False), "kept": ("kept", kept)}
    _table(next((form for form in forms if _width(form) <= out.width), bare))
    guarded = "; ~ safe, ! not shown safe (guarded tasks)" if comparison.harm_tested else ""
    out.say(
        f"scores in %{own_units(comparison.tasks)}, 95 % intervals; mean over skills, {_corrected(comparison.tasks)}; kept: share of the best "
        f"parents' skills; + better, \N{MINUS SIGN} worse than {comparison.baseline}{guarded}"
    )
    if text := withheld(comparison):
        _say(text)
    for c in shown:
        if c.aliases:
            out.say(f"{c.name}: same weights as {', '.join(c.aliases)}")
    say_harm(comparison)
    if comparison.facts:
        _edited_facts(comparison)
    for warning in comparison.warnings:
        out.warn(warning)


def _best(comparison: Comparison) -> list[ComparedConfiguration]:
    """Return the configurations of the table of scores: all if they are few, else the best, the one that the recommendation is about, and the baseline."""
    if len(comparison.judged) <= BEST:
        return comparison.configurations
    about = comparison.recommendation.about if comparison.recommendation else None
    ranked = sorted(comparison.configurations, key=lambda c: c.level, reverse=True)
    first = [c for c in ranked if c.name != comparison.baseline][:BEST]
    return [c for c in ranked if c in first or c.name in (about, comparison.baseline)]


def unlisted(comparison: Comparison) -> int:
    """Return the number of configurations that the table of scores does not show."""
    return len(comparison.configurations) - len(_best(comparison))


def _task_columns(
    comparison: Comparison, shown: Sequence[ComparedConfiguration], *, ends: bool
) -> dict[str, tuple[str, list[str]]]:
    """Return a column of scores for each task, with or without intervals, and with marks for the comparison's verdicts."""
    columns = {}
    for task in comparison.tasks:
        cells = []
        for c in shown:
            found, row = c.scores.get(task.task), comparison.differences.get((c.name, task.task))
            text = _interval(found, unit_of(comparison, task.task), ends) if found else ""
            cells.append(text + (MARKS.get(row.verdict, "  ") if row else "  "))
        sign = ", lower is better" if task.lower else ""
        columns[f"task {task.task}"] = (f"{task.task} (n={task.n}{sign})" if ends else f"{task.task}  ", cells)
    return columns


def _turned(columns: Columns) -> Columns:
    """Return the table with a row for each column that has a cell, and a column for each row."""
    (_, names), *rest = columns.values()
    filled = [(head, cells) for head, cells in rest if any(cell.strip() for cell in cells)]
    turned = {f"of {name}": (name, [cells[i] for _, cells in filled]) for i, name in enumerate(names)}
    return {"task": ("task", [head for head, _ in filled]), **turned}


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


def _interval(found: Level | Kept | None, unit: Unit, ends: bool = True) -> str:
    if found is None or found.value is None:
        return ""
    return f"{unit.score(found.value)} {unit.levels(found.low, found.high) if ends else ''}".rstrip()


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
            cells = list(zip(*rows, strict=True))
            _table({"configuration" if i == 0 else str(i): (name, cells[i]) for i, name in enumerate(head)})
            if measure.baseline is not None:
                out.say(f"{comparison.baseline}: {grid.unit(measure).score(measure.baseline)}")
        out.line("")


STYLES = {"better": "green", "worse": "red", "safe": "green", "not shown safe": "yellow"}
"""Verdict -> color on a terminal. Other verdicts have none."""


def recommended(comparison: Comparison) -> None:
    """Print the recommendation on stdout: what to ship, why, and the commands that do it; or why nothing and what would help."""
    found = comparison.recommendation
    if not found:
        return
    for line in _wrapped(found.text, out.width):
        out.colored([(line, "bold green" if found.configuration else "bold yellow")])
    for text in (*(f"what would help: {one}" for one in found.help), *found.details):
        for line in _wrapped(text, out.width - 2):
            out.line(f"  {line}")
    for text in found.command:
        out.line(f"  {text}")


def _wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text; a number stays on one line with its interval and unit."""
    fixed = re.sub(r"\S+ \[[^\]]*\](?: points| %)?", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrap(fixed, width)]


def _say(text: str) -> None:
    """Print a message, on a terminal in lines of its width."""
    for line in _wrapped(text, out.talk.width) if out.talk.is_terminal else [text]:
        out.say(line)


def rows_table(comparison: Comparison, pair: tuple[str, str] | None = None) -> None:
    """Print one row per configuration and task: difference, intervals, verdict, and the margin beside "cannot tell".

    Where the table is wider than the terminal, each configuration gets a block of its own, without the columns that do not fit.

    Args:
        comparison: The comparison.
        pair: Names of the baseline and of the only configuration to print, whose scores are then printed too; default: all.
    """
    rows = [r for r in comparison.rows if pair is None or r.configuration == pair[1]]
    tasks = {t.task: t for t in comparison.tasks}
    units = {name: unit_of(comparison, name) for name in tasks}
    beside = any(r.verdict == "cannot tell" and r.companion for r in rows)
    columns = {key: (head, [make(r, units[r.task]) for r in rows]) for key, (head, make) in _columns(pair, beside).items()}
    if pair is not None:
        out.heading(f"{pair[1]} against {pair[0]}")
    if _width(columns) <= out.width:
        _table(columns)
    elif pair is not None:
        _block(columns, rows, units)
    else:
        names = list(dict.fromkeys(r.configuration for r in rows))
        for name in names:
            if name != names[0]:
                out.line("")
            own = [i for i, r in enumerate(rows) if r.configuration == name]
            out.heading(name)
            part = {k: (head, [cells[i] for i in own]) for k, (head, cells) in columns.items() if k != "configuration"}
            _block(part, [rows[i] for i in own], units)
    from workbench.report.provenance import families

    family = comparison.family
    out.say(
        f"differences in points{own_units(comparison.tasks)} against {comparison.baseline}; {family.text}; "
        f"{'step-down max-T' if family.correction == 'max-t' else 'no correction'} at {family.alpha:g}: {families(family)}"
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


def _columns(pair: tuple[str, str] | None, beside: bool) -> dict[str, tuple[str, Callable[[Difference, Unit], str]]]:
    """Return the columns of the table of differences: key -> head, and the cell of a row given the unit of its task."""
    columns: dict[str, tuple[str, Callable[[Difference, Unit], str]]] = {
        "configuration": ("configuration", lambda r, _: r.configuration),
        "task": ("task", lambda r, _: r.task),
        "metric": ("metric", lambda r, _: r.metric),
    }
    if pair is not None:
        del columns["configuration"]
        columns["before"] = (pair[0], lambda r, unit: unit.score(r.baseline_value))
        columns["after"] = (pair[1], lambda r, unit: unit.score(r.value))
    columns |= {
        "diff": ("diff", lambda r, unit: unit.diff(r.diff)),
        "plain": ("95 %", lambda r, unit: unit.diffs(r.low, r.high)),
        "adjusted": ("adjusted", lambda r, unit: unit.diffs(r.low_adj, r.high_adj)),
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
    """Print columns as a table, the verdicts in color on a terminal. Columns that do not fit follow in a table of their own, with the first one again."""
    keys = list(columns)
    while _width({key: columns[key] for key in keys}) > out.width and len(keys) > 2:
        keys.pop()
    rest = {key: column for key, column in columns.items() if key not in keys[1:]}
    columns = {key: columns[key] for key in keys}
    out.table(
        [head for head, _ in columns.values()],
        zip(*(cells for _, cells in columns.values()), strict=True),
        right=[i for i, key in enumerate(keys) if key not in _LEFT],
        style=lambda i, cell: next(
            (style for word, style in STYLES.items() if keys[i] == "verdict" and cell.startswith(word)), ""
        ),
    )
    if len(rest) > 1:
        _table(rest)


def _block(columns: Columns, rows: Sequence[Difference], units: Mapping[str, Unit]) -> None:
    """Print the rows of one configuration within the terminal's width, and what its verdicts add in lines below."""
    shown = {**columns, "verdict": ("verdict", [str(r.verdict) for r in rows])}
    for key in _DROPPED:
        if _width(shown) > out.width:
            shown.pop(key, None)
    _table(shown)
    for r in rows:
        if facts := _facts(r, units[r.task]):
            out.line(f"  {r.task}: {', '.join(facts)}")
        if "margin" in columns and "margin" not in shown and (margin := _companion(r)):
            out.line(f"  {r.task}: margin in nats {margin}")


def say_harm(comparison: Comparison) -> None:
    """Print sentences on losses and safety of guarded tasks, on rows that can get no verdict, and on whether to merge or to route."""
    from workbench.report import wording
    from workbench.report.decision import advised

    for text in (*wording.sentences(comparison), *advised(comparison)):
        _say(text)


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


def _verdict(row: Difference, unit: Unit) -> str:
    """Return a row's verdict with what it adds, in parentheses."""
    facts = _facts(row, unit)
    return str(row.verdict) + (f" ({', '.join(facts)})" if facts else "")


def _facts(row: Difference, unit: Unit) -> list[str]:
    """Return a verdict's tolerance and condition; of an undecided one also the smallest detectable effect, items needed and reason."""
    facts, reason = list[str](), row.reason or ""
    if row.tolerance is not None and row.verdict != "no item changed":
        facts.append(f"tolerance {unit.score(row.tolerance)}")
    if row.condition:
        facts.append(f"{row.condition} {unit.score(row.stands_up_to)}")
    if reason.startswith("too few clusters"):
        facts.append(reason.split(",")[0])
    if row.impossible:
        facts.append("no difference can be significant: more clusters or fewer comparisons are needed")
    if reason.startswith("the suite gives no tolerance"):
        facts.append("no tolerance")
    if row.verdict == "cannot tell" and row.mde is not None and not row.impossible:
        facts.append(f"mde {unit.score(row.mde)}")
    if row.needed and row.verdict in ("cannot tell", "not shown safe"):
        facts.append(f"needs about n = {about(row.needed)}")
    return facts


def _companion(row: Difference) -> str:
    margin = row.companion
    if not margin or row.verdict != "cannot tell":
        return ""
    return f"{NATS.diff(margin.diff)} {NATS.diffs(margin.low, margin.high)}, p {margin.p or 0:.2g}"


def own_units(tasks: Sequence[ComparedTask]) -> str:
    """Return a note that names the tasks whose scores are not in percent or points."""
    own = [t.task for t in tasks if not t.share]
    return f" (of {', '.join(own)} in the metric's own units)" if own else ""
