"""Tables of comparisons for the terminal: scores of configurations, and their differences from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.cli._output import out

if TYPE_CHECKING:
    from workbench.compare.compare import Comparison, Difference
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
        f"scores in %{_own_units(tasks)}, 95 % intervals; mean over skills, {_corrected(tasks)}; kept: share of the best parents' skills; "
        f"+ better, - worse than {document['baseline']}{guarded} ({_correction(family)}: {_families(family)})"
    )
    for c in document["configurations"]:
        for task, share in c["kept"].items():
            if reason := share.get("reason"):
                out.say(f"kept: {c['name']} on {task} is withheld: {reason}")
        if c["aliases"]:
            out.say(f"{c['name']}: same weights as {', '.join(c['aliases'])}")
    _told(document)
    if document["facts"]:
        _facts(document)
    for warning in document["warnings"]:
        out.warn(warning)


def _facts(document: Row) -> None:
    """Print results of sequential edits as a table, and one line per edit: how many of its facts are still answered."""
    from workbench.report.edits import fact_suites, step_rows
    from workbench.report.reading import view_of

    for suite in fact_suites(document, view_of(document)):
        if suite.steps:
            heads, rows = step_rows(suite)
            out.table(heads, rows, right=range(3, len(heads)))
        for left in suite.survivals:
            out.say(f"{suite.source}: {left.sentence()}")


def rows_table(document: Row) -> None:
    """Print one row per configuration and task: difference, intervals, verdict, and the margin beside "cannot tell"."""
    shares = {t["task"]: t["share"] for t in document["tasks"]}
    beside = any(r["verdict"] == "cannot tell" and r["companion"] for r in document["rows"])
    heads = [
        "configuration",
        "task",
        "metric",
        "diff",
        "95 %",
        "adjusted",
        "p adj",
        "n",
        "verdict",
        *(["margin in nats, 95 %"] if beside else []),
    ]
    rows = []
    for r in document["rows"]:
        share = shares[r["task"]]
        cells = [
            r["configuration"],
            r["task"],
            r["metric"],
            _signed(r["diff"], share),
            _range(r["low"], r["high"], share),
            _range(r["low_adj"], r["high_adj"], share),
            "" if r["p_adj"] is None else f"{r['p_adj']:.3g}",
            str(r["n"]),
            _verdict(r, share),
        ]
        rows.append([*cells, *([_companion(r)] if beside else [])])
    out.table(heads, rows, right=range(3, 8))
    family = document["family"]
    tasks = document["tasks"]
    out.say(
        f"differences in points{_own_units(tasks)} against {document['baseline']}; {family['text']}; "
        f"{_correction(family)} at {family['alpha']:g}: {_families(family)}"
    )
    if lower := [t["task"] for t in tasks if t["lower"]]:
        out.say(f"lower is better: {', '.join(lower)}")
    if beside:
        out.say("margin: lead of the right choice over the other choices; tested separately, it does not change a verdict")
    _told(document)


def _told(document: Row) -> None:
    """Print sentences on losses and safety of guarded tasks, on rows that can get no verdict, and on whether to merge or to route."""
    from workbench.report import guard
    from workbench.report.reading import view_of
    from workbench.report.routed import advised

    view = view_of(document)
    for text in (*(guard.on_task(view, task) for task in view.guarded), *guard.impossible(view), *advised(document)):
        if text:
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


def _verdict(row: Row, share: bool) -> str:
    """Return a row's verdict with its tolerance; an undecided one also with its smallest detectable effect, items needed and reason."""
    facts, reason, still = [], row["reason"] or "", row["verdict"] in ("cannot tell", "not shown safe")
    if row["tolerance"] is not None and row["verdict"] != "no item changed":
        facts.append(f"tolerance {_number(row['tolerance'], share)}")
    if reason.startswith("too few clusters"):
        facts.append(reason.split(",")[0])
    if closed := reason.startswith(
        ("no difference can be significant", "no verdict can fall")
    ):  # the latter is in older documents
        facts.append("no difference can be significant: more clusters or fewer comparisons are needed")
    if reason.startswith("the suite gives no tolerance"):
        facts.append("no tolerance")
    if row["verdict"] == "cannot tell" and row["mde"] is not None and not closed:
        facts.append(f"mde {_number(row['mde'], share)}")
    if still and row["needs"] and row["needs"] > row["n"]:
        facts.append(f"needs about n = {row['needs']}")
    return str(row["verdict"]) + (f" ({', '.join(facts)})" if facts else "")


def _companion(row: Row) -> str:
    margin = row["companion"]
    if not margin or row["verdict"] != "cannot tell":
        return ""
    return f"{margin['diff']:+.3f} {_range(margin['low'], margin['high'], False)}, p {margin['p']:.2g}"


def _head(task: Row) -> str:
    sign = ", lower is better" if task["lower"] else ""
    return f"{task['task']} (n={task['n']}{sign})"


def _own_units(tasks: list[Row]) -> str:
    """Return a note that names the tasks whose scores are not in percent or points."""
    own = [t["task"] for t in tasks if not t["share"]]
    return f" (of {', '.join(own)} in the metric's own units)" if own else ""


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


def _correction(family: Row) -> str:
    return "step-down max-T" if family["correction"] == "max-t" else "no correction"


def _families(family: Row) -> str:
    """Return the number of rows of each family, in words."""
    from workbench.report.facts import families

    return families(family)


def _interval(found: Row | None, share: bool = True) -> str:
    if not found or found.get("value") is None:
        return ""
    low, high = found.get("low"), found.get("high")
    text = _number(found["value"], share, digits=0)
    return text if low is None or high is None else f"{text} [{_number(low, share, digits=0)}, {_number(high, share, digits=0)}]"


def _number(value: float, share: bool, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}" if share else f"{value:.4g}"


def _signed(value: float, share: bool) -> str:
    return f"{100 * value:+.1f}" if share else f"{value:+.3g}"


def _range(low: float | None, high: float | None, share: bool) -> str:
    return "" if low is None or high is None else f"[{_signed(low, share)}, {_signed(high, share)}]"
