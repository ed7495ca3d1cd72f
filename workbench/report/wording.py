"""Sentences of the report: what was compared, missing controls, losses, and verdicts on guarded tasks."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.compare.comparison import ComparedTask, Comparison
from workbench.compare.configurations import ComparedConfiguration
from workbench.compare.differences import VERDICTS, Difference, Verdict
from workbench.ground.numbers import about, few, listed, plural, unbroken
from workbench.report.numbers import PERCENT, POINTS, unit_of

_DETAILED = 3  # configurations whose losses get a sentence each
_COUNTED = 6  # with more configurations, verdicts other than "worse" are counted instead of listed


def harm(view: Comparison) -> list[str]:
    """Return one sentence per named configuration that is worse on a guarded task, the largest losses first."""
    losses: dict[str, list[Difference]] = {}
    for d in _rows(view, view.guarded):
        if d.verdict == "worse":
            losses.setdefault(d.configuration, []).append(d)
    ranked = sorted(losses.items(), key=lambda item: -max(abs(d.diff or 0.0) * unit_of(view, d.task).scale for d in item[1]))
    sentences = [
        f"{name} {listed(_loss(view, d) for d in lost)}: worse than {view.baseline}." for name, lost in ranked[:_DETAILED]
    ]
    if rest := [name for name, _ in ranked[_DETAILED:]]:
        tasks = listed(dict.fromkeys(d.task for name in rest for d in losses[name]))
        sentences.append(f"{listed(rest)} {'is' if len(rest) == 1 else 'are'} worse than {view.baseline} on {tasks} too.")
    return sentences


def harm_in_one(view: Comparison) -> list[str]:
    """Return one sentence per guarded task that names all configurations that are worse on it, without their losses."""
    sentences = []
    for task in view.guarded:
        if names := [d.configuration for d in _rows(view, [task]) if d.verdict == "worse"]:
            sentences.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} worse than {view.baseline} on {task.name}.")
    return sentences


def lacking(view: Comparison, d: Difference) -> str:
    """Return why a difference with the verdict "not shown safe" is not, and the number of items that would help, for parentheses."""
    unit = unit_of(view, d.task)
    items_needed = f"about {about(d.needed)} items needed" if d.needed else ""
    if (d.reason or "").startswith("too few clusters"):
        reason = (d.reason or "").split(",")[0]
    elif d.tolerance is None:
        reason = "the suite gives no tolerance"
    elif d.worst is None:
        reason = "no loss can be ruled out"
    elif d.worst < d.tolerance and d.reason:
        reason = d.reason
    else:
        reason = f"a loss of up to {unit.score(d.worst)} is possible"
    return "; ".join(part for part in (reason, items_needed) if part)


def sentences(view: Comparison) -> list[str]:
    """Return sentences on guarded tasks, and on comparisons that cannot be significant."""
    return [*(text for task in view.guarded if (text := on_task(view, task))), *impossible(view)]


def on_task(view: Comparison, task: ComparedTask) -> str:
    """Return one sentence with the named configurations' verdicts on a guarded task; empty if none was compared."""
    differences = list(_rows(view, [task]))
    order = sorted(VERDICTS, key=lambda word: word != "worse")
    clauses = [text for word in order if (text := _verdicts(view, word, [d for d in differences if d.verdict == word]))]
    if not clauses:
        return ""
    unit = unit_of(view, task.name)
    limit = f" (tolerance {unit.score(task.tolerance)} {unit.word}".rstrip() + ")" if task.tolerance is not None else ""
    return f"On {task.name}{limit}, {'; '.join(clauses)}."


def impossible(view: Comparison) -> list[str]:
    """Return sentences on comparisons that cannot be significant, because their clusters are too few for the size of the family."""
    hopeless = [d for d in view.differences.values() if d.impossible]
    main, controls = [d for d in hopeless if not d.apart], [d for d in hopeless if d.apart]
    percent = f"{PERCENT.score(view.family.alpha)}\N{NO-BREAK SPACE}%"
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


def _rows(view: Comparison, tasks: Iterable[ComparedTask]) -> Iterable[Difference]:
    """Yield the differences of the named configurations."""
    listed_tasks = list(tasks)
    return (d for c in view.judged for d in view.compared(c.name, listed_tasks))


def _loss(view: Comparison, d: Difference) -> str:
    """Return a loss as a predicate with its plain interval, such as "loses 4.3 points of retention [-7.9, -0.7]"."""
    unit = unit_of(view, d.task)
    size = f"{unit.score(abs(d.diff or 0.0))} {unit.word}".rstrip()
    ends = unbroken(unit.diffs(d.low, d.high))
    if unit == POINTS and not d.lower:
        return f"loses {size} on {d.task} {ends}".rstrip()
    side = "above" if (d.diff or 0.0) > 0 else "below"
    return f"is {size} {side} {view.baseline} on {d.task} {ends}".rstrip() + (", where lower is better" if d.lower else "")


def _verdicts(view: Comparison, word: Verdict, differences: list[Difference]) -> str:
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
        return f"{listed(f'{d.configuration} ({lacking(view, d)})' for d in differences)} {verb} not shown safe"
    than = {"equivalent": f"equivalent to {view.baseline}", "safe": "safe", "not shown safe": "not shown safe"}.get(
        word, f"{word} than {view.baseline}"
    )
    return f"{listed(names)} {verb} {than}"


_AVERAGES = 3  # sets of bricks without a plain average that are named


def title(view: Comparison) -> str:
    """Return the heading, such as "4 configurations compared with base"."""
    number = len(view.judged)
    if number == 0:
        return f"Controls compared with {view.baseline}"
    return f"{plural(number, 'configuration')} compared with {view.baseline}"


def scope(view: Comparison) -> str:
    """Return sentences on the tasks, the number of items and the paired design."""
    tasks = [t for t in view.tasks if t.contrast is None]
    skills, retention = [t.name for t in tasks if t.role == "skill"], [t.name for t in tasks if t.role == "retention"]
    guarded = [t.name for t in tasks if t.role == "guarded"]
    others = [t.name for t in tasks if t.role not in ("skill", "retention", "guarded")]
    parts = [f"{plural(len(skills), 'skill task')} ({listed(skills)})"] if skills else []
    if others:
        parts.append(f"{plural(len(others), 'other task')} ({listed(others)})")
    if retention:
        parts.append(f"{listed(retention)}, which test{'' if len(retention) > 1 else 's'} what the base could already do")
    if guarded:
        parts.append(f"{listed(guarded)}, which must not get worse")
    items = plural(sum(t.n for t in tasks), "item")
    contrasts = [f"{t.name} is {t.contrast.of} minus {t.contrast.minus}" for t in view.tasks if t.contrast]
    return (
        f"Scored on {' and on '.join(parts) or 'no task'}; {items} in total. All configurations answer the "
        f"same items, and each difference from {view.baseline} is computed item by item."
        + (f" {listed(contrasts)}, paired by item." if contrasts else "")
    )


def what(c: ComparedConfiguration) -> str:
    """Describe a configuration in a few words, for readers who do not see its recipe."""
    bricks = listed(c.bricks or c.parents)
    if c.role == "base":
        return "the base without bricks"
    if c.role == "brick":
        return f"the brick {bricks or c.name} alone on the base"
    if c.role == "average":
        return f"the plain average of {bricks}" if bricks else "the plain average of the bricks"
    if c.role == "memory":
        return "the base with the edit's facts put before the prompt (`edit: memory`)"
    if c.role == "finetune":
        return "the base fine-tuned on the edit's facts (`edit: finetune`)"
    if c.role == "adapter":
        return "the base with a LoRA trained on the edit's facts and their paraphrases (`edit: adapter`)"
    origin = f"made from {bricks}" if bricks else "made without bricks"
    return origin if c.recipe_text else f"a configuration {origin}; its recipe file was not found"


def withheld(view: Comparison) -> str:
    """Return one paragraph on ratios to a parent that are withheld, configurations with the same reason together; empty if there are none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, task, reason in view.withheld:
        groups.setdefault((task, reason), []).append(name)
    return " ".join(f"Kept is withheld for {few(names)} on {task}: {reason}." for (task, reason), names in groups.items())


def diff_pair(view: Comparison) -> tuple[str, str]:
    """Return the two configurations whose recipes the page compares first, the baseline first if it has a recipe."""
    texts = [c.name for c in sorted(view.named, key=lambda c: c.name != view.baseline) if c.recipe_text]
    names = [*texts, *(c.name for c in view.by_role if c.name not in texts)] or [""]
    return names[0], names[1] if len(names) > 1 else names[0]


def missing_controls(view: Comparison) -> list[str]:
    """Return sentences on missing controls: the base, each parent alone, an average."""
    roles = {role for c in view.by_role for role in c.roles}
    shown = {name for c in view.by_role for name in (c.name, *c.aliases)}
    notes = [] if "base" in roles else [f"The base was not scored; differences are against {view.baseline}."]
    lacking = [p for p in dict.fromkeys(p for c in view.named for p in c.parents) if p not in shown]
    if lacking:
        notes.append(f"Not scored alone: {listed(lacking)}. The report cannot show how much of their skill a merge kept.")
    if "average" not in roles and any(len(c.parents) > 1 for c in view.named):
        notes.append("No plain average of the bricks was scored, so the report cannot show whether a merge is better than one.")
    return notes


def without_average(view: Comparison) -> list[str]:
    """Return the sets of parents whose plain average was not scored, in words; empty if no average was scored at all."""
    averaged = [set(c.parents) for c in view.by_role if "average" in c.roles]
    sets = dict.fromkeys(c.parents for c in view.named if len(c.parents) > 1)
    lacking = [listed(s) for s in sets if averaged and not any(a == set(s) or not a for a in averaged)]
    more = len(lacking) - _AVERAGES
    return lacking if more <= 0 else [*lacking[:_AVERAGES], f"{more} other {'set' if more == 1 else 'sets'} of bricks"]


def interference(view: Comparison) -> str:
    """Return one sentence on bricks that are worse than the base on a task of another brick."""
    owners = {t.name: t.owner for t in view.tasks}
    harmed = [
        f"{brick} on {task} ({unit_of(view, task).worded(e.diff)})"
        for (brick, task), e in view.interference.effects.items()
        if e.verdict == "worse" and owners.get(task) != brick
    ]
    if harmed:
        return f"Worse than the base on a task that is not the brick's own: {listed(harmed)}."
    return "These items show no brick that is worse than the base on a task that is not its own."


def chance_correction(view: Comparison, role: str) -> str:
    """Say whether means over the tasks of a role are corrected for chance, and name the tasks where they are not."""
    tasks = [t for t in view.tasks if t.role == role]
    uncorrected = [t.name for t in tasks if t.chance is None]
    if not uncorrected:
        return "corrected for chance"
    return (
        "not corrected for chance" if len(uncorrected) == len(tasks) else f"corrected for chance except on {listed(uncorrected)}"
    )


def same_weights(c: ComparedConfiguration) -> str:
    """Return the other names of a configuration's weights, such as "same weights as average"; empty where there are none."""
    return f"same weights as {listed(c.aliases)}" if c.aliases else ""
