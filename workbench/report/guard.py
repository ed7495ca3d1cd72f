"""Sentences about harm: guarded tasks that are worse, safe or not shown safe, and comparisons that cannot be significant."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.report.numbers import PERCENT, POINTS, about, listed, plural, unbroken
from workbench.report.view import VERDICTS, DifferenceView, TaskView, View

_DETAILED = 3  # configurations whose losses get a sentence each
_COUNTED = 6  # with more configurations, verdicts other than "worse" are counted instead of listed


def harm(view: View) -> list[str]:
    """Return one sentence per named configuration that is worse on a guarded task, the largest losses first."""
    losses: dict[str, list[DifferenceView]] = {}
    for d in _rows(view, view.guarded):
        if d.word == "worse":
            losses.setdefault(d.configuration, []).append(d)
    ranked = sorted(losses.items(), key=lambda item: -max(abs(d.diff or 0.0) * view.unit(d.task).scale for d in item[1]))
    sentences = [
        f"{name} {listed(_loss(view, d) for d in lost)}: worse than {view.baseline}." for name, lost in ranked[:_DETAILED]
    ]
    if rest := [name for name, _ in ranked[_DETAILED:]]:
        tasks = listed(dict.fromkeys(d.task for name in rest for d in losses[name]))
        sentences.append(f"{listed(rest)} {'is' if len(rest) == 1 else 'are'} worse than {view.baseline} on {tasks} too.")
    return sentences


def harm_in_one(view: View) -> list[str]:
    """Return one sentence per guarded task that names all configurations that are worse on it, without their losses."""
    sentences = []
    for task in view.guarded:
        names = [d.configuration for d in _rows(view, [task]) if d.word == "worse"]
        if names:
            sentences.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} worse than {view.baseline} on {task.name}.")
    return sentences


def clause(view: View, d: DifferenceView) -> str:
    """Return the headline's clause on one guarded task, such as "on retention it is safe (...)"."""
    unit = view.unit(d.task)
    if d.word == "no item changed":
        return f"on {d.task} no item changed"
    if d.word == "cannot tell":  # an older document
        interval = unbroken(unit.diffs(d.low_adj, d.high_adj))
        return f"on {d.task} these items cannot tell {_bracketed(f'{unit.worded(d.diff)} {interval}')}"
    if d.word == "safe":
        return f"on {d.task} it is safe: {unit.worded(d.diff)} {unbroken(unit.diffs(d.low_adj, d.high_adj))}, tolerance {_tolerance(view, d)}"
    if d.word == "not shown safe":
        return f"on {d.task} it is not shown safe ({unit.worded(d.diff)}; {lacking(view, d)})"
    ends = (d.low, d.high) if d.guarded else (d.low_adj, d.high_adj)  # "worse" is a test of this configuration alone
    return f"on {d.task} it is {d.word} {_bracketed(f'{unit.worded(d.diff)} {unbroken(unit.diffs(*ends))}')}"


def lacking(view: View, d: DifferenceView, limit: bool = True) -> str:
    """Return the reason why a difference is not shown safe and the number of items that would help, as text for parentheses.

    Args:
        view: The comparison.
        d: A difference with the verdict "not shown safe".
        limit: Whether to name the tolerance too.
    """
    unit = view.unit(d.task)
    items_needed = f"about {about(d.needs)} items needed" if d.needs else ""
    if (d.reason or "").startswith("too few clusters"):
        reason = (d.reason or "").split(",")[0]
    elif d.tolerance is None:
        reason = "the suite gives no tolerance"
    elif d.worst is None:
        reason = "no loss can be ruled out"
    else:
        reason = f"a loss of up to {unit.score(d.worst)} is possible"
    if limit and d.tolerance is not None:
        reason += f", the tolerance is {_tolerance(view, d)}"
    return "; ".join(part for part in (reason, items_needed) if part)


def on_task(view: View, task: TaskView) -> str:
    """Return one sentence with the named configurations' verdicts on a guarded task; empty if none was compared."""
    differences = list(_rows(view, [task]))
    order = sorted(VERDICTS, key=lambda word: word != "worse")
    clauses = [text for word in order if (text := _verdicts(view, word, [d for d in differences if d.word == word]))]
    if not clauses:
        return ""
    limit = f" (tolerance {task.unit.score(task.tolerance)} {task.unit.word}".rstrip() + ")" if task.tolerance is not None else ""
    return f"On {task.name}{limit}, {'; '.join(clauses)}."


def impossible(view: View) -> list[str]:
    """Return sentences on comparisons that cannot be significant, because their clusters are too few for the size of the family."""
    hopeless = [d for d in view.differences.values() if d.impossible]
    main, controls = [d for d in hopeless if not d.apart], [d for d in hopeless if d.apart]
    percent = f"{PERCENT.score(view.alpha)}\N{NO-BREAK SPACE}%"
    sentences = []
    for differences, whose in ((main, ""), (controls, " of controls")):
        if differences:
            tasks = {d.task: d.clusters for d in differences}
            named_tasks = listed(f"{t} ({plural(k, 'cluster')})" if k else t for t, k in tasks.items())
            sentences.append(
                f"No difference can be significant in {plural(len(differences), 'comparison')}{whose}, on {named_tasks}: even if all changed clusters had "
                f"changed in the same direction, the adjusted p would be above {percent}. More clusters or fewer comparisons are needed."
            )
    return sentences


def _rows(view: View, tasks: Iterable[TaskView]) -> Iterable[DifferenceView]:
    """Yield the differences of the named configurations."""
    listed_tasks = list(tasks)
    return (d for c in view.judged for d in view.compared(c.name, listed_tasks))


def _loss(view: View, d: DifferenceView) -> str:
    """Return a loss as a predicate with its plain interval, such as "loses 4.3 points of retention [-7.9, -0.7]"."""
    unit = view.unit(d.task)
    size = f"{unit.score(abs(d.diff or 0.0))} {unit.word}".rstrip()
    ends = unbroken(unit.diffs(d.low, d.high))
    if unit == POINTS and not d.lower:
        return f"loses {size} on {d.task} {ends}".rstrip()
    side = "above" if (d.diff or 0.0) > 0 else "below"
    return f"is {size} {side} {view.baseline} on {d.task} {ends}".rstrip() + (", where lower is better" if d.lower else "")


def _tolerance(view: View, d: DifferenceView) -> str:
    return view.unit(d.task).score(d.tolerance)


def _verdicts(view: View, word: str, differences: list[DifferenceView]) -> str:
    """Say which configurations have a verdict on a guarded task, such as "a and b are safe"."""
    if not differences:
        return ""
    names = [d.configuration for d in differences]
    if len(names) > _COUNTED and word != "worse":
        names = [f"{len(names)} configurations"]
        differences = []
    verb = "is" if len(names) == 1 and differences else "are"
    if word in ("cannot tell", "no item changed"):
        return f"{word} for {listed(names)}"
    if word == "not shown safe" and differences:
        return f"{listed(f'{d.configuration} ({lacking(view, d, limit=False)})' for d in differences)} {verb} not shown safe"
    than = {"equivalent": f"equivalent to {view.baseline}", "safe": "safe", "not shown safe": "not shown safe"}.get(
        word, f"{word} than {view.baseline}"
    )
    return f"{listed(names)} {verb} {than}"


def _bracketed(text: str) -> str:
    return f"({text.strip()})"
