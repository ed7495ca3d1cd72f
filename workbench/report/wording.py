"""Sentences of the report on what was compared, on the verdicts and on missing controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.report import decision, guard
from workbench.report.numbers import PERCENT, POINTS, about, listed, plural, unbroken
from workbench.report.view import VERDICTS, ConfigurationView, DifferenceView, View, verdict_word

_AVERAGES = 3  # sets of bricks without a plain average that are named


@dataclass(frozen=True)
class Finding:
    """One or two sentences on a configuration."""

    name: str
    text: str


def title(view: View) -> str:
    """Return the heading, such as "4 configurations compared with base"."""
    number = len(view.judged)
    if number == 0:
        return f"Controls compared with {view.baseline}"
    return f"{plural(number, 'configuration')} compared with {view.baseline}"


def scope(view: View) -> str:
    """Return sentences on the tasks, the number of items and the paired design."""
    tasks = [t for t in view.tasks if t.contrast is None]
    skills, retention = [t.name for t in tasks if t.role == "skill"], [t.name for t in tasks if t.role == "retention"]
    guarded = [t.name for t in tasks if t.role == "guarded"]
    others = [t.name for t in tasks if t.role not in ("skill", "retention", "guarded")]
    parts = [f"{plural(len(skills), 'skill task')} ({listed(skills)})"] if skills else []
    if others:
        parts.append(f"{plural(len(others), 'other task')} ({listed(others)})")
    if retention:
        parts.append(f"{listed(retention)}, which {_verb(retention, 'test')} what the base could already do")
    if guarded:
        parts.append(f"{listed(guarded)}, which must not get worse")
    items = plural(sum(t.n or 0 for t in tasks), "item")
    contrasts = [f"{t.name} is {t.contrast[0]} minus {t.contrast[1]}" for t in view.tasks if t.contrast]
    return (
        f"Scored on {' and on '.join(parts) or 'no task'}; {items} in total. All configurations answer the "
        f"same items, and each difference from {view.baseline} is computed item by item."
        + (f" {listed(contrasts)}, paired by item." if contrasts else "")
    )


def _verb(subjects: Sequence[str], verb: str) -> str:
    """Return a verb in the present tense, singular for one subject."""
    return verb if len(subjects) > 1 else f"{verb}s"


def headline(view: View) -> list[str]:
    """Return sentences on the configuration with the highest mean over skills: its mean, the baseline's mean and its verdicts."""
    ranked = sorted((c for c in view.judged if c.mean), key=_level, reverse=True)
    if not ranked:
        return []
    best, rest = ranked[0], ranked[1:]
    text = f"{best.name} has {'the highest' if rest else 'a'} mean over skills{':' if rest else ' of'} {_mean(best)}"
    base = view.configuration(view.baseline)
    sentences = [text + (f"; {base.name} has {_mean(base)}." if base is not None and base.mean is not None else ".")]
    above = [c for c in view.controls if c.mean and c.name != view.baseline and _level(c) > _level(best)]
    if above:
        told = listed(f"{c.name} ({_mean(c)})" for c in above)
        sentences.append(
            f"The control {told} has a higher mean." if len(above) == 1 else f"The controls {told} have higher means."
        )
    skills = view.compared(best.name, [t for t in view.tasks if t.role == "skill" and t.contrast is None])
    clauses = []
    if skills:
        better, worse = ([d.task for d in skills if d.word == word] for word in ("better", "worse"))
        told = f"better than {view.baseline} on {len(better)} of {plural(len(skills), 'skill task')}"
        clauses.append(told + (f" and worse on {listed(worse)}" if worse else " and worse on none"))
    others = view.compared(best.name, [t for t in view.tasks if not t.guarded and (t.role != "skill" or t.contrast)])
    if worse_tasks := [d.task for d in others if d.word == "worse"]:
        clauses.append(
            f"worse on {listed(worse_tasks)}, which {'is not a skill task' if len(worse_tasks) == 1 else 'are not skill tasks'}"
        )
    if impossible := [d.task for d in skills if d.impossible]:
        clauses.append(f"no difference can be significant on {listed(impossible)}")
    clauses += [guard.clause(view, d) for d in view.compared(best.name, view.guarded)]
    if clauses:
        subject = f"{best.name if above else 'It'} is "
        sentences.append((subject + "; ".join(clauses) if skills else _capital("; ".join(clauses))) + ".")
    if rest:
        is_same = bool(best.digest) and rest[0].digest == best.digest
        relation = "the two have the same weights" if is_same else decision.relation(view, best.name, rest[0].name)
        sentences.append(f"{rest[0].name} is next with {_mean(rest[0])}" + (f"; {relation}." if relation else "."))
    return sentences


def _level(c: ConfigurationView) -> float:
    return c.mean.value if c.mean and c.mean.value is not None else -math.inf


def _mean(c: ConfigurationView) -> str:
    """Return the mean over skills with its interval, in points."""
    return f"{POINTS.score(c.mean.value)} {unbroken(POINTS.levels(c.mean.low, c.mean.high))}".strip() if c.mean else ""


def summary(view: View) -> list[str]:
    """Return sentences on all named configurations: guarded tasks, skill tasks, then comparisons that cannot be significant."""
    if not view.judged:
        return guard.impossible(view)
    sentences = [sentence for task in view.guarded if (sentence := guard.on_task(view, task))]
    if skills := [t for t in view.tasks if t.role == "skill"]:
        verdicts = {c.name: [d.word for d in view.compared(c.name, skills)] for c in view.judged}
        gains = [n for n, v in verdicts.items() if "better" in v]
        losses = [n for n, v in verdicts.items() if "worse" in v]
        sentences.append(
            f"{_share(gains, view, f'better than {view.baseline}', 'skill task', begin=True)}; "
            f"{_share(losses, view, 'worse', 'one')}."
        )
    return sentences + guard.impossible(view)


def findings(view: View) -> list[Finding]:
    """Return one finding per named configuration that gets sentences, the highest mean over skills first."""
    by_name = {c.name: c for c in view.judged}
    return [Finding(name, _finding(view, by_name[name])) for name in decision.leading(view)]


def what(c: ConfigurationView) -> str:
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


def diff_pair(view: View) -> tuple[str, str]:
    """Return the two configurations whose recipes the page compares first, the baseline first if it has a recipe."""
    texts = [c.name for c in sorted(view.named, key=lambda c: c.name != view.baseline) if c.recipe_text]
    names = [*texts, *(c.name for c in view.configurations if c.name not in texts)] or [""]
    return names[0], names[1] if len(names) > 1 else names[0]


def missing_controls(view: View) -> list[str]:
    """Return sentences on missing controls: the base, each parent alone, an average."""
    roles = {role for c in view.configurations for role in c.roles}
    shown = {name for c in view.configurations for name in (c.name, *c.aliases)}
    notes = [] if "base" in roles else [f"The base was not scored; differences are against {view.baseline}."]
    lacking = [p for p in dict.fromkeys(p for c in view.named for p in c.parents) if p not in shown]
    if lacking:
        notes.append(f"Not scored alone: {listed(lacking)}. The report cannot show how much of their skill a merge kept.")
    if "average" not in roles and any(len(c.parents) > 1 for c in view.named):
        notes.append("No plain average of the bricks was scored, so the report cannot show whether a merge is better than one.")
    return notes


def without_average(view: View) -> list[str]:
    """Return the sets of parents whose plain average was not scored, in words; empty if no average was scored at all."""
    averaged = [set(c.parents) for c in view.configurations if "average" in c.roles]
    sets = dict.fromkeys(c.parents for c in view.named if len(c.parents) > 1)
    lacking = [listed(s) for s in sets if averaged and not any(a == set(s) or not a for a in averaged)]
    more = len(lacking) - _AVERAGES
    return lacking if more <= 0 else [*lacking[:_AVERAGES], f"{more} other {'set' if more == 1 else 'sets'} of bricks"]


def interference(view: View) -> str:
    """Return one sentence on bricks that are worse than the base on a task of another brick."""
    owners = {t.name: t.owner for t in view.tasks}
    harmed = [
        f"{e.brick} on {e.task} ({view.unit(e.task).worded(e.diff)})"
        for e in view.effects.values()
        if verdict_word(e.verdict) == "worse" and owners.get(e.task) != e.brick
    ]
    if harmed:
        return f"Worse than the base on a task that is not the brick's own: {listed(harmed)}."
    return "These items show no brick that is worse than the base on a task that is not its own."


def chance_correction(view: View, role: str) -> str:
    """Say whether means over the tasks of a role are corrected for chance, and name the tasks where they are not."""
    tasks = [t for t in view.tasks if t.role == role]
    uncorrected = [t.name for t in tasks if t.uncorrected]
    if not uncorrected:
        return "corrected for chance"
    return (
        "not corrected for chance" if len(uncorrected) == len(tasks) else f"corrected for chance except on {listed(uncorrected)}"
    )


def same_weights(c: ConfigurationView) -> str:
    """Return the other names of a configuration's weights, such as "same weights as average"; empty where there are none."""
    return f"same weights as {listed(c.aliases)}" if c.aliases else ""


def _finding(view: View, configuration: ConfigurationView) -> str:
    """Return the verdicts of one configuration, grouped by verdict, and the share of skill that it keeps."""
    differences = view.compared(configuration.name, view.tasks)
    if not differences:
        return f"This document has no difference against {view.baseline}."
    clauses = []
    for verdict in VERDICTS:
        group = [d for d in differences if d.word == verdict]
        if group:
            clauses.append(f"{_intro(verdict, view)} {listed(_difference_text(view, d) for d in group)}")
    text = _capital("; ".join(clauses)) + "." if clauses else ""
    kept_mean = configuration.kept_mean
    if kept_mean is not None and kept_mean.value is None:
        text += f" The share of its parents' skill that it keeps is withheld ({kept_mean.reason})."
    elif kept_mean is not None:
        share = f"{PERCENT.score(kept_mean.value)}\N{NO-BREAK SPACE}% {PERCENT.levels(kept_mean.low, kept_mean.high)}"
        text += f" It keeps {share.strip()} of its parents' skill."
    return text.strip()


def _intro(verdict: str, view: View) -> str:
    """Return the words before the list of tasks with a verdict."""
    return {
        "better": f"better than {view.baseline} on",
        "worse": f"worse than {view.baseline} on",
        "equivalent": "equivalent on",
        "cannot tell": "cannot tell on",
        "safe": "safe on",
        "not shown safe": "not shown safe on",
        "no item changed": "no item changed on",
    }[verdict]


def _difference_text(view: View, d: DifferenceView) -> str:
    """Return a task with its difference and, if the verdict is open, what would decide it."""
    unit = view.unit(d.task)
    if d.word == "no item changed":
        return d.task
    if d.impossible:
        return f"{d.task} ({unit.diff(d.diff)}; no difference can be significant)"
    if d.word == "not shown safe":
        return f"{d.task} ({unit.diff(d.diff)}; {guard.lacking(view, d)})"
    if d.word == "cannot tell":
        needs = f"; about {about(d.needs)} items needed" if d.needs else ""
        return f"{d.task} ({unit.diff(d.diff)}{needs})"
    return f"{d.task} ({unit.diff(d.diff)})"


def _share(names: Sequence[str], view: View, verdict: str, task: str, begin: bool = False) -> str:
    """Say which configurations have a verdict on a skill task, such as "all are worse on at least one"."""
    every = [c.name for c in view.judged]
    if not names:
        none = "None is" if begin else "none is"
        subject = none if len(every) > 1 else f"{every[0]} is not"
        return f"{subject} {verdict} on any {task}".removesuffix(" one")
    everyone = "All" if begin else "all"
    subject = everyone if len(names) == len(every) > 1 else listed(names)
    some = "at least one" if task == "one" else f"at least one {task}"
    return f"{subject} {'is' if len(names) == 1 else 'are'} {verdict} on {some}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
