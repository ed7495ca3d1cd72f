"""Tables of scores for the terminal: configurations with their intervals, groups of tasks, and edited facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.cli._output import out
from workbench.cli._verdicts import correction, families_text, number, own_units, told

if TYPE_CHECKING:
    from workbench.compare.compare import Comparison
    from workbench.scores.store import Scores

Row = Mapping[str, Any]
# Verdict -> mark after a score. Other verdicts have no mark.
MARKS = {"better": " +", "worse": " -", "safe": " ~", "not shown safe": " !"}


def groups_table(groups: Sequence[Row]) -> None:
    """Print one row per configuration and aggregate of a group of tasks."""
    if groups:
        out.table(
            ["configuration", "group", "metric", "tasks", "n", "score"],
            [[g["configuration"], g["alias"], _filtered(g), str(g["tasks"]), str(g["n"]), f"{g['value']:.4f}"] for g in groups],
            right=(3, 4, 5),
        )
        if not all(g["weighted"] for g in groups):
            out.say("groups: mean over items if tasks are weighted by size, mean over tasks if not (weight_by_size: false)")


def _filtered(group: Row) -> str:
    return group["metric"] if group["filter"] == "none" else f"{group['metric']},{group['filter']}"


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
    document = comparison.document()
    tasks = document["tasks"]
    verdict = {(r["configuration"], r["task"]): r["verdict"] for r in document["rows"]}
    rows = []
    for c in document["configurations"]:
        cells = [c["name"], _interval(c["mean"])]
        for task in tasks:
            found = c["scores"].get(task["task"])
            mark = MARKS.get(verdict.get((c["name"], task["task"]), ""), "  ")
            cells.append(_interval(found, task["share"]) + mark if found else "")
        cells.append("withheld" if (c["kept_mean"] or {}).get("reason") else _interval(c["kept_mean"]))
        rows.append(cells)
    heads = ["configuration", "mean", *(_head(t) for t in tasks), "kept"]
    out.table(heads, rows, right=range(1, len(heads)))
    family = document["family"]
    guarded = "; ~ safe, ! not shown safe (guarded tasks)" if any(r["family"] == "guarded" for r in document["rows"]) else ""
    out.say(
        f"scores in %{own_units(tasks)}, 95 % intervals; mean over skills, {_corrected(tasks)}; kept: share of the best parents' skills; "
        f"+ better, - worse than {document['baseline']}{guarded} ({correction(family)}: {families_text(family)})"
    )
    for c in document["configurations"]:
        for task, share in c["kept"].items():
            if reason := share.get("reason"):
                out.say(f"kept: {c['name']} on {task} is withheld: {reason}")
        if c["aliases"]:
            out.say(f"{c['name']}: same weights as {', '.join(c['aliases'])}")
    told(document)
    if document["facts"]:
        _facts(document)
    for warning in document["warnings"]:
        out.warn(warning)


def _facts(document: Row) -> None:
    """Print results of sequential edits as a table, and sentences on generated answers and on the facts that survive."""
    from workbench.report.edits import fact_suites, step_rows
    from workbench.report.reading import view_of

    for suite in fact_suites(document, view_of(document)):
        if suite.steps:
            heads, rows = step_rows(suite)
            out.table(heads, rows, right=range(3, len(heads)))
        for written in suite.written:
            out.say(f"{suite.source}: {written.sentence()}")
        for left in suite.survivals:
            out.say(f"{suite.source}: {left.sentence()}")


def _head(task: Row) -> str:
    sign = ", lower is better" if task["lower"] else ""
    return f"{task['task']} (n={task['n']}{sign})"


def _corrected(tasks: list[Row]) -> str:
    """Return a phrase that says whether the mean over skills is corrected for chance, and on which tasks it is not."""
    bare = [t["task"] for t in tasks if t["role"] == "skill" and t["chance"] is None]
    if not bare:
        return "chance-corrected"
    return (
        f"chance-corrected except on {', '.join(bare)}"
        if len(bare) < sum(t["role"] == "skill" for t in tasks)
        else "not corrected for chance"
    )


def _interval(found: Row | None, share: bool = True) -> str:
    if not found or found.get("value") is None:
        return ""
    low, high = found.get("low"), found.get("high")
    text = number(found["value"], share, digits=0)
    return text if low is None or high is None else f"{text} [{number(low, share, digits=0)}, {number(high, share, digits=0)}]"
