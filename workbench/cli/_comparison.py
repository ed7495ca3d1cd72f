"""Tables of scores for the terminal: configurations with their intervals, groups of tasks, edited facts, costs and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.cli._output import out
from workbench.cli._verdicts import correction, families_text, number, own_units, say_harm

if TYPE_CHECKING:
    from workbench.compare.comparison import ComparedTask, Comparison
    from workbench.compare.configurations import ConfigurationCosts, Level
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
        _facts(comparison)
    for warning in comparison.warnings:
        out.warn(warning)


def _facts(comparison: Comparison) -> None:
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
    from workbench.report.costs import HEADS, cells, unknown

    out.line("")
    out.table(
        ["configuration", *(head.lower() for head in HEADS)],
        [[c.configuration, *(cell.text for cell in cells(c))] for c in costs],
        right=range(1, len(HEADS)),
    )
    counted = list(dict.fromkeys(c.peak_of for c in costs if c.peak_of))
    if counted:
        out.say(f"peak memory while a task is scored: {'; '.join(counted)}")
    for sentence in unknown({c.configuration: c for c in costs}):
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
