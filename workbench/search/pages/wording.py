"""Sentences of a search report: the winner and its verdict, the number of candidates, and the facts at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from workbench.ground.numbers import MISSING, count, listed, plural, seconds
from workbench.search.pages.view import ObjectiveView, SearchView, written
from workbench.search.result import CandidateVerdict, TestedRow, TrialRow, Unbeaten

NBSP = "\N{NO-BREAK SPACE}"


def title(view: SearchView) -> str:
    """Return the heading."""
    return f"Search of {view.found.name}"


def headline(view: SearchView) -> str:
    """Return a sentence on the winner and the best control on test items, or on the configurations that no candidate beats."""
    chosen = [t for name in view.chosen if (t := view.row(name, "found"))]
    if not chosen:
        return _unbeaten(view, view.found.unbeaten) if view.found.unbeaten else "This search has not tested any candidate."
    if len(view.objectives) == 1:
        (objective,) = view.objectives
        return f"On {plural(objective.test_items, 'test item')} that the search did not use, " + _beside(
            view, chosen[0], objective
        )
    verb = "was" if len(chosen) == 1 else "were"
    return (
        f"On {plural(view.found.items.test, 'test item')} that the search did not use, "
        f"{plural(len(chosen), 'candidate')} of the Pareto front {verb} tested: {listed(t.name for t in chosen)}."
    )


def sentences(view: SearchView) -> list[str]:
    """Return sentences on optimism or on each objective, on the number of candidates and on the best random candidate."""
    sentences = []
    chosen = [t for name in view.chosen if (t := view.row(name, "found"))]
    if len(view.objectives) == 1:
        sentences += [_optimism(view, t, view.objectives[0]) for t in chosen[:1]]
    elif chosen:
        sentences += [_verdicts(view, chosen, o) for o in view.objectives]
    return [s for s in [*sentences, tried(view), _random(view)] if s]


def tried(view: SearchView) -> str:
    """Return a sentence on the number of candidates that were scored on all items, were stopped early or failed."""

    def outcomes(candidates: Sequence[TrialRow]) -> str:
        stopped, failed = sum(bool(c.stopped) for c in candidates), sum(c.failed for c in candidates)
        full = sum(c.complete for c in candidates)
        parts = [f"{count(full)} {'was' if full == 1 else 'were'} scored on all {plural(view.found.items.search, 'search item')}"]
        parts += [f"{count(stopped)} {'was' if stopped == 1 else 'were'} stopped early"] if stopped else []
        parts += [f"{count(failed)} failed"] if failed else []
        return listed(parts)

    if not view.found.trials:
        return "The search tried no candidate."
    text = f"Of {plural(len(view.searched), 'candidate')} of the sampler {view.found.sampler}, {outcomes(view.searched)}."
    return text + (f" Of {plural(len(view.drawn), 'random candidate')}, {outcomes(view.drawn)}." if view.drawn else "")


def gap(objective: ObjectiveView, against: CandidateVerdict) -> str:
    """Return a difference with its interval, such as "−8.3 [−17.2, +0.5] points"."""
    test = against.test
    ends = objective.unit.diffs(test.low, test.high).replace(" ", NBSP)
    return " ".join(part for part in (objective.unit.diff(test.diff), ends, objective.unit.word) if part)


def fate(candidate: TrialRow, view: SearchView) -> str:
    """Return a candidate's outcome in words: scored on all items, stopped early or failed."""
    if candidate.failed:
        return f"failed: {candidate.error}" if candidate.error else "failed"
    if candidate.stopped:
        by = f", beaten by {candidate.beaten_by}" if candidate.beaten_by else ""
        return f"stopped early after {count(candidate.items)} of {count(view.found.items.search)} items{by}"
    return f"scored on all {count(candidate.items)} items" if candidate.items is not None else "scored on all items"


def values(candidate: TrialRow) -> list[str]:
    """Return one line per dimension of the candidate."""
    return [f"{name} {written(value)}" for name, value in candidate.values.items()]


def tip(candidate: TrialRow, view: SearchView) -> str:
    """Return the hover text of a candidate, one fact per line."""
    scores = []
    for objective in view.objectives if candidate.scores else ():
        estimate = " (estimate)" if candidate.stopped else ""
        scores.append(f"{objective.measure}: {score(candidate, objective)}{estimate}")
    return "\n".join([candidate.name, *scores, *values(candidate), fate(candidate, view)])


def score(candidate: TrialRow, objective: ObjectiveView) -> str:
    """Return a candidate's score under an objective as text."""
    return objective.unit.score(candidate.scores[objective.index]) if candidate.scores else MISSING


def interval(candidate: TrialRow, objective: ObjectiveView) -> str:
    """Return the interval of a candidate's score, such as "[70.1, 78.3]"; empty if it has none."""
    ends = candidate.interval(objective.index)
    return f"[{', '.join(objective.unit.score(end) for end in ends)}]" if ends else ""


def notes(tested: TestedRow, view: SearchView) -> str:
    """Return the words below a tested configuration's name: its part in the search, its values and a control of equal weights."""
    parts = []
    if tested.part == "control":
        parts += ["best control"] if tested.name == view.found.best_control else []
        parts += ["the recipe as written"] if tested.name == view.found.name else []
        return ", ".join(parts)
    if tested.part == "random":
        parts.append("best random candidate")
    elif tested.name == view.found.winner:
        parts.append("winner")
    elif tested.name in (view.found.front or ()):
        parts.append("on the Pareto front")
    candidate = next((c for c in view.found.trials if c.name == tested.name), None)
    parts += values(candidate) if candidate else []
    return ", ".join([*parts, *([f"same weights as {tested.same_as}"] if tested.same_as else [])])


def difference(tested: TestedRow, view: SearchView, objective: ObjectiveView) -> float | None:
    """Return the difference from the best control on test items, positive if better.

    For candidates it is the paired difference, for controls the difference of the two scores.
    """
    if paired := view.paired(tested, objective):
        return paired.test.diff
    best = view.row(view.found.best_control, "control")
    if best is None or tested is best:
        return None
    difference = tested.test[objective.index] - best.test[objective.index]
    return -difference if objective.lower else difference


def facts(view: SearchView) -> list[tuple[str, str]]:
    """Return the terms and texts of the list at the end, without empty ones."""
    found = view.found
    times = [c.duration for c in found.trials if c.duration is not None]
    provenance = view.comparison.provenance if view.comparison else None
    entries = [
        ("Objective" if len(view.objectives) == 1 else "Objectives", "; ".join(_objective(o) for o in view.objectives)),
        ("Space", "; ".join(domain(d.name, view) for d in view.dimensions)),
        ("Sampler", f"{found.sampler}, seed {found.seed}"),
        ("Items", f"{count(found.items.search)} for search, {count(found.items.test)} for test"),
        (
            "Stages",
            f"candidates are compared after {listed(count(n) for n in accumulate(found.stages))} items"
            if len(found.stages) > 1
            else "",
        ),
        ("Time for candidates", seconds(sum(times)) if times else ""),
        ("Folder", found.directory),
        ("Key", found.key),
        ("Device", provenance.device if provenance else ""),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (provenance.versions if provenance else {}).items())),
    ]
    return [(term, text) for term, text in entries if text]


def domain(name: str, view: SearchView) -> str:
    """Return a dimension and its possible values: "mix.lambda 0.4 to 1.4", "mix.merge ties or task_arithmetic"."""
    d = next(d for d in view.dimensions if d.name == name)
    if not d.numeric:
        return f"{name} {', '.join(d.choices[:-1])} or {d.choices[-1]}"
    return f"{name} {written(d.low)} to {written(d.high)}{' (logarithmic)' if d.log else ''}"


def _unbeaten(view: SearchView, unbeaten: Sequence[Unbeaten]) -> str:
    """Return the headline of a search without a winner."""
    if len(view.objectives) > 1:
        return (
            f"No candidate beats {listed(_called(u) for u in unbeaten)}: on search items, each scored candidate fell behind a control "
            "or a random candidate under every objective."
        )
    (objective,), best = view.objectives, unbeaten[0]
    return (
        f"No candidate beats {_called(best)}, which scores {level(objective, best.search[0])} on search items and "
        f"{level(objective, best.test[0])} on {plural(objective.test_items, 'test item')} that the search did not use."
    )


def _called(unbeaten: Unbeaten) -> str:
    """Return a configuration's name with its role, for use in a sentence."""
    roles = {
        "base": "the base" if unbeaten.name == "base" else f"the base {unbeaten.name}",
        "brick": f"brick {unbeaten.name}",
        "average": f"the control {unbeaten.name}",
        "configuration": f"the untuned recipe {unbeaten.name}",
        "random": f"the random candidate {unbeaten.name}",
    }
    return roles.get(unbeaten.role, unbeaten.name)


def _beside(view: SearchView, tested: TestedRow, objective: ObjectiveView) -> str:
    """Return the winner's score beside the best control's, with their difference."""
    index = objective.index
    text = f"{tested.name} scores {level(objective, tested.test[index])}"
    best, paired = view.row(view.found.best_control, "control"), view.paired(tested, objective)
    if best is None or paired is None:
        return f"{text} on {objective.name}. No control was scored for comparison."
    if tested.same_as == best.name:
        return f"{text}. The winner has the same weights as the best control, {best.name}."
    twin = f" The winner has the same weights as the control {tested.same_as}." if tested.same_as else ""
    return f"{text} and the best control, {best.name}, {level(objective, best.test[index])}: {_ruled(objective, paired)}.{twin}"


def _ruled(objective: ObjectiveView, difference: CandidateVerdict) -> str:
    """Return a difference with its verdict, and the reason if there are too few clusters for a verdict."""
    if difference.verdict == "no item changed":
        return "no item changed"
    few = f" ({difference.reason})" if difference.reason and "cluster" in difference.reason else ""
    return f"{gap(objective, difference)}, {difference.verdict}{few}"


def level(objective: ObjectiveView, value: float) -> str:
    """Return a score with its percent sign, where the objective is a share."""
    shown = objective.unit.score(value)
    return f"{shown}{NBSP}%" if objective.unit.word == "points" else shown


def _optimism(view: SearchView, tested: TestedRow, objective: ObjectiveView) -> str:
    """Return the sentence that compares the winner's difference on search items with that on test items."""
    paired = view.paired(tested, objective)
    if paired is None or tested.same_as == view.found.best_control:
        return ""
    unit = objective.unit
    sentence = f"On the search items, which selected it, its difference is {unit.worded(paired.search.diff)}"
    if unit.diff(paired.optimism) == unit.diff(0.0):
        return f"{sentence}, the same as on the test items."
    size = f"{unit.score(abs(paired.optimism))} {unit.word}".rstrip()
    if paired.optimism > 0:
        return f"{sentence}, {size} more than on the test items: the search items are too optimistic by that much."
    return f"{sentence}, {size} less than on the test items: the search items are not too optimistic."


def _verdicts(view: SearchView, chosen: Sequence[TestedRow], objective: ObjectiveView) -> str:
    """Return a sentence on the front's verdicts against the best control under one objective."""
    groups: dict[str, list[str]] = {}
    for t in chosen:
        if paired := view.paired(t, objective):
            same = paired.verdict == "no item changed"
            text = t.name if same else f"{t.name} ({objective.unit.diff(paired.test.diff)})"
            groups.setdefault(paired.verdict, []).append(text)
    words = {
        "better": f"better than {view.found.best_control}: ",
        "worse": f"worse than {view.found.best_control}: ",
        "no item changed": f"with no item changed from {view.found.best_control}: ",
    }
    order = [*words, *(v for v in groups if v not in words)]
    clauses = [words.get(v, f"{v}: ") + listed(groups[v]) for v in order if v in groups]
    return f"On {objective.name}, {'; '.join(clauses)}." if clauses else ""


def _random(view: SearchView) -> str:
    """Return the sentence on the best random candidate; empty if there is none."""
    best = next((t for t in view.tested if t.part == "random"), None)
    if best is None:
        return ""
    scores = []
    for o in view.objectives:
        paired = view.paired(best, o)
        on = f" on {o.name}" if len(view.objectives) > 1 else ""
        against = f" (against {view.found.best_control}: {_ruled(o, paired)})" if paired else ""
        scores.append(f"{level(o, best.test[o.index])}{on}{against}")
    return f"The best random candidate, {best.name}, scores {listed(scores)} on test items."


def _objective(o: ObjectiveView) -> str:
    return f"{o.name}, {o.direction}" + (
        f": mean of {', '.join(o.terms)}" if len(o.terms) > 1 else f": {o.terms[0]}" if o.terms else ""
    )
