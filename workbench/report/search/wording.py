"""Sentences of a search report: the winner and its verdict, the number of candidates, and the facts at the end."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.report.numbers import MISSING, count, listed, plural, seconds
from workbench.report.search.view import Against, Candidate, ObjectiveView, SearchView, TestedView, Unbeaten, written

NBSP = "\N{NO-BREAK SPACE}"


def title(view: SearchView) -> str:
    """Return the heading."""
    return f"Search of {view.name}"


def headline(view: SearchView) -> str:
    """Return a sentence on the winner and the best control on test items, or on the configurations that no candidate beats."""
    chosen = [t for name in view.chosen if (t := view.row(name, "candidate"))]
    if not chosen:
        return _unbeaten(view) if view.unbeaten else "This search has not tested any candidate."
    if len(view.objectives) == 1:
        (objective,) = view.objectives
        return f"On {items(objective.test_items, 'test item')} that the search did not use, " + _beside(
            view, chosen[0], objective
        )
    verb = "was" if len(chosen) == 1 else "were"
    return (
        f"On {items(view.test_items, 'test item')} that the search did not use, "
        f"{plural(len(chosen), 'candidate')} of the Pareto front {verb} tested: {listed(t.name for t in chosen)}."
    )


def sentences(view: SearchView) -> list[str]:
    """Return sentences on optimism or on each objective, on the number of candidates and on the best random candidate."""
    sentences = []
    chosen = [t for name in view.chosen if (t := view.row(name, "candidate"))]
    if len(view.objectives) == 1:
        sentences += [_optimism(view, t, view.objectives[0]) for t in chosen[:1]]
    elif view.best_control:
        sentences += [_verdicts(view, chosen, o) for o in view.objectives] if chosen else []
    return [s for s in [*sentences, tried(view), _random(view)] if s]


def tried(view: SearchView) -> str:
    """Return a sentence on the number of candidates that were scored on all items, were stopped early or failed."""

    def outcomes(candidates: Sequence[Candidate]) -> str:
        stopped, failed = sum(c.stopped for c in candidates), sum(c.failed for c in candidates)
        full = sum(c.complete for c in candidates)
        parts = [f"{count(full)} {'was' if full == 1 else 'were'} scored on all {items(view.search_items, 'search item')}"]
        parts += [f"{count(stopped)} {'was' if stopped == 1 else 'were'} stopped early"] if stopped else []
        parts += [f"{count(failed)} failed"] if failed else []
        return listed(parts)

    if not view.candidates:
        return "The search tried no candidate."
    sampler = f" of the sampler {view.sampler}" if view.sampler else ""
    text = f"Of {plural(len(view.searched), 'candidate')}{sampler}, {outcomes(view.searched)}."
    return text + (f" Of {plural(len(view.drawn), 'random candidate')}, {outcomes(view.drawn)}." if view.drawn else "")


def gap(objective: ObjectiveView, against: Against) -> str:
    """Return a difference with its interval, such as "−8.3 points [−17.2, +0.5]"."""
    return f"{objective.unit.worded(against.diff)} {objective.unit.diffs(against.low, against.high).replace(' ', NBSP)}".strip()


def fate(candidate: Candidate, view: SearchView) -> str:
    """Return a candidate's outcome in words: scored on all items, stopped early or failed."""
    if candidate.failed:
        return f"failed: {candidate.error}" if candidate.error else "failed"
    of = f" of {count(view.search_items)}" if view.search_items else ""
    if candidate.stopped:
        by = f", beaten by {candidate.beaten_by}" if candidate.beaten_by else ""
        return f"stopped early after {count(candidate.items)}{of} items{by}"
    return f"scored on all {count(candidate.items)} items" if candidate.items is not None else "scored on all items"


def values(candidate: Candidate) -> list[str]:
    """Return one line per dimension of the candidate."""
    return [f"{name} {written(value)}" for name, value in candidate.values.items()]


def tip(candidate: Candidate, view: SearchView) -> str:
    """Return the hover text of a candidate, one fact per line."""
    scores = []
    for objective in view.objectives if candidate.scores else ():
        estimate = " (estimate)" if candidate.stopped else ""
        scores.append(f"{objective.measure}: {score(candidate, objective)}{estimate}")
    return "\n".join([candidate.name, *scores, *values(candidate), fate(candidate, view)])


def score(candidate: Candidate, objective: ObjectiveView) -> str:
    """Return a candidate's score under an objective as text."""
    scores = candidate.scores
    return objective.unit.score(scores[objective.index]) if scores and objective.index < len(scores) else MISSING


def interval(candidate: Candidate, objective: ObjectiveView) -> str:
    """Return the interval of a candidate's score, such as "[70.1, 78.3]"; empty if it has none."""
    ends = candidate.interval(objective)
    return f"[{', '.join(objective.unit.score(end) for end in ends)}]" if ends else ""


def notes(tested: TestedView, view: SearchView) -> str:
    """Return the words below a tested configuration's name: its part in the search, its values and a control of equal weights."""
    parts = []
    if tested.kind == "control":
        parts += ["best control"] if tested.name == view.best_control else []
        parts += ["the recipe as written"] if tested.name == view.name else []
        return ", ".join(parts)
    if tested.kind == "random":
        parts.append("best random candidate")
    elif tested.name == view.winner:
        parts.append("winner")
    elif tested.name in view.front:
        parts.append("on the Pareto front")
    candidate = next((c for c in view.candidates if c.name == tested.name), None)
    parts += values(candidate) if candidate else []
    return ", ".join([*parts, *([f"same weights as {tested.twin}"] if tested.twin else [])])


def difference(tested: TestedView, view: SearchView, objective: ObjectiveView) -> float | None:
    """Return the difference from the best control on test items, positive if better.

    For candidates it is the paired difference, for controls the difference of the two scores.
    """
    paired = tested.against[objective.index]
    if paired is not None:
        return paired.diff
    best = view.row(view.best_control, "control")
    ends = (tested.test[objective.index], best.test[objective.index] if best else None)
    if ends[0] is None or ends[1] is None or tested is best:
        return None
    return (ends[1] - ends[0]) if objective.lower else (ends[0] - ends[1])


def facts(view: SearchView) -> list[tuple[str, str]]:
    """Return the terms and texts of the list at the end, without those that the document lacks."""
    items = [(count(n), word) for n, word in ((view.search_items, "for search"), (view.test_items, "for test")) if n is not None]
    times = [c.seconds for c in view.candidates if c.seconds is not None]
    provenance = view.comparison.provenance if view.comparison else None
    entries = [
        ("Objective" if len(view.objectives) == 1 else "Objectives", "; ".join(_objective(o) for o in view.objectives)),
        ("Space", "; ".join(domain(d.name, view) for d in view.dimensions)),
        ("Sampler", view.sampler + (f", seed {view.seed}" if view.sampler and view.seed is not None else "")),
        ("Items", ", ".join(f"{n} {word}" for n, word in items)),
        (
            "Stages",
            f"candidates are compared after {listed(count(n) for n in _sums(view.stages))} items" if len(view.stages) > 1 else "",
        ),
        ("Time for candidates", seconds(sum(times)) if times else ""),
        ("Folder", view.directory),
        ("Key", view.key),
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


def _unbeaten(view: SearchView) -> str:
    """Return the headline of a search whose candidates were all stopped early."""
    if len(view.objectives) > 1:
        return (
            f"No candidate beats {listed(_called(u) for u in view.unbeaten)}: on search items, each scored candidate fell behind a control "
            "or a random candidate under every objective."
        )
    (objective,), best = view.objectives, view.unbeaten[0]
    return (
        f"No candidate beats {_called(best)}, which scores {level(objective, best.search[0])} on search items and "
        f"{level(objective, best.test[0])} on {items(objective.test_items, 'test item')} that the search did not use."
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


def _beside(view: SearchView, tested: TestedView, objective: ObjectiveView) -> str:
    """Return the winner's score beside the best control's, with their difference."""
    index = objective.index
    text = f"{tested.name} scores {level(objective, tested.test[index])}"
    best, paired = view.row(view.best_control, "control"), tested.against[index]
    if best is None or paired is None:
        return f"{text} on {objective.name}. No control was scored for comparison."
    if tested.twin == best.name:
        return f"{text}. The winner has the same weights as the best control, {best.name}."
    twin = f" The winner has the same weights as the control {tested.twin}." if tested.twin else ""
    return f"{text} and the best control, {best.name}, {level(objective, best.test[index])}: {_ruled(objective, paired)}.{twin}"


def _ruled(objective: ObjectiveView, difference: Against) -> str:
    """Return a difference with its verdict, and the reason if there are too few clusters for a verdict."""
    if difference.verdict == "no item changed":
        return "no item changed"
    few = f" ({difference.reason})" if difference.reason and "cluster" in difference.reason else ""
    return f"{gap(objective, difference)}, {difference.verdict or MISSING}{few}"


def level(objective: ObjectiveView, value: float | None) -> str:
    """Return a score with its percent sign, where the objective is a share."""
    shown = objective.unit.score(value)
    return f"{shown}{NBSP}%" if objective.unit.word == "points" else shown


def _optimism(view: SearchView, tested: TestedView, objective: ObjectiveView) -> str:
    """Return the sentence that compares the winner's difference on search items with that on test items."""
    paired = tested.against[objective.index]
    if paired is None or paired.search is None or paired.optimism is None or tested.twin == view.best_control:
        return ""
    unit = objective.unit
    sentence = f"On the search items, which selected it, its difference is {unit.worded(paired.search)}"
    if unit.diff(paired.optimism) == unit.diff(0.0):
        return f"{sentence}, the same as on the test items."
    size = f"{unit.score(abs(paired.optimism))} {unit.word}".rstrip()
    if paired.optimism > 0:
        return f"{sentence}, {size} more than on the test items: the search items are too optimistic by that much."
    return f"{sentence}, {size} less than on the test items: the search items are not too optimistic."


def _verdicts(view: SearchView, chosen: Sequence[TestedView], objective: ObjectiveView) -> str:
    """Return a sentence on the front's verdicts against the best control under one objective."""
    groups: dict[str, list[str]] = {}
    for t in chosen:
        paired = t.against[objective.index]
        if paired is not None:
            same = paired.verdict == "no item changed"
            text = t.name if same else f"{t.name} ({objective.unit.diff(paired.diff)})"
            groups.setdefault(paired.verdict or MISSING, []).append(text)
    words = {
        "better": f"better than {view.best_control}: ",
        "worse": f"worse than {view.best_control}: ",
        "no item changed": f"with no item changed from {view.best_control}: ",
    }
    order = [*words, *(v for v in groups if v not in words)]
    clauses = [words.get(v, f"{v}: ") + listed(groups[v]) for v in order if v in groups]
    return f"On {objective.name}, {'; '.join(clauses)}." if clauses else ""


def _random(view: SearchView) -> str:
    """Return the sentence on the best random candidate; empty if there is none."""
    best = next((t for t in view.tested if t.kind == "random"), None)
    if best is None:
        return ""
    scores = []
    for o in view.objectives:
        paired = best.against[o.index]
        on = f" on {o.name}" if len(view.objectives) > 1 else ""
        against = f" (against {view.best_control}: {_ruled(o, paired)})" if paired and paired.diff is not None else ""
        scores.append(f"{level(o, best.test[o.index])}{on}{against}")
    return f"The best random candidate, {best.name}, scores {listed(scores)} on test items."


def _objective(o: ObjectiveView) -> str:
    return f"{o.name}, {o.direction}" + (
        f": mean of {', '.join(o.terms)}" if len(o.terms) > 1 else f": {o.terms[0]}" if o.terms else ""
    )


def items(n: int | None, word: str) -> str:
    """Return a number of items in words; the word alone if the number is not known."""
    return plural(n, word) if n is not None else f"{word}s"


def _sums(stages: Sequence[int]) -> list[int]:
    return [sum(stages[: i + 1]) for i in range(len(stages))]
