"""Sentences on a search: what won and how sure that is, how many candidates there were, where the recipe is."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.report.numbers import MISSING, count, listed, plural, seconds
from workbench.report.search.view import Against, Candidate, ObjectiveView, SearchView, TestedView, Unbeaten, written

NBSP = "\N{NO-BREAK SPACE}"


def title(view: SearchView) -> str:
    """The heading."""
    return f"Search of {view.name}"


def headline(view: SearchView) -> str:
    """What won, beside the best control, on items that no candidate saw; or what no candidate beats."""
    chosen = [t for name in view.chosen if (t := view.row(name, "candidate"))]
    if not chosen:
        return _unbeaten(view) if view.unbeaten else "No candidate of this search has been tested."
    if len(view.objectives) == 1:
        (objective,) = view.objectives
        return f"On {_items(objective.test_items, 'test item')} that no candidate saw, " + _beside(view, chosen[0], objective)
    return (
        f"On {_items(view.test_items, 'test item')} that no candidate saw, "
        + f"{plural(len(chosen), 'candidate')} of the front {'was' if len(chosen) == 1 else 'were'} tested: {listed(t.name for t in chosen)}."
    )


def sentences(view: SearchView) -> list[str]:
    """The verdict's details: optimism, objectives one by one, candidates, the random arm."""
    found = []
    chosen = [t for name in view.chosen if (t := view.row(name, "candidate"))]
    if len(view.objectives) == 1:
        found += [_optimism(view, t, view.objectives[0]) for t in chosen[:1]]
    elif view.best_control:
        found += [_verdicts(view, chosen, o) for o in view.objectives] if chosen else []
    return [s for s in [*found, tried(view), _random(view)] if s]


def tried(view: SearchView) -> str:
    """How many candidates there were, and what became of them."""

    def told(candidates: Sequence[Candidate]) -> str:
        given_up, failed = sum(c.stopped for c in candidates), sum(c.failed for c in candidates)
        full = sum(c.complete for c in candidates)
        parts = [f"{count(full)} saw all {_items(view.search_items, 'search item')}"]
        parts += [f"{count(given_up)} {'was' if given_up == 1 else 'were'} given up before"] if given_up else []
        parts += [f"{count(failed)} failed"] if failed else []
        return listed(parts)

    if not view.candidates:
        return "No candidate was tried."
    sampler = f" of the sampler {view.sampler}" if view.sampler else ""
    text = f"Of {plural(len(view.searched), 'candidate')}{sampler}, {told(view.searched)}."
    return text + (f" Of {plural(len(view.drawn), 'random candidate')}, {told(view.drawn)}." if view.drawn else "")


def gap(objective: ObjectiveView, found: Against) -> str:
    """A difference with its interval, such as "−8.3 points [−17.2, +0.5]"."""
    return f"{objective.unit.worded(found.diff)} {objective.unit.diffs(found.low, found.high).replace(' ', NBSP)}".strip()


def fate(candidate: Candidate, view: SearchView) -> str:
    """What became of a candidate."""
    if candidate.failed:
        return f"failed: {candidate.error}" if candidate.error else "failed"
    of = f" of {count(view.search_items)}" if view.search_items else ""
    if candidate.stopped:
        by = f", beaten by {candidate.beaten_by}" if candidate.beaten_by else ""
        return f"given up after {count(candidate.items)}{of} items{by}"
    return f"saw all {count(candidate.items)} items" if candidate.items is not None else "saw all items"


def values(candidate: Candidate) -> list[str]:
    """One line a dimension that the candidate has."""
    return [f"{name} {written(value)}" for name, value in candidate.values.items()]


def tip(candidate: Candidate, view: SearchView) -> str:
    """Hover text of a candidate, one fact a line."""
    scores = []
    for objective in view.objectives if candidate.scores else ():
        estimate = " (estimate)" if candidate.stopped else ""
        scores.append(f"{objective.measure}: {score(candidate, objective)}{estimate}")
    return "\n".join([candidate.name, *scores, *values(candidate), fate(candidate, view)])


def score(candidate: Candidate, objective: ObjectiveView) -> str:
    """A candidate's score under an objective."""
    found = candidate.scores
    return objective.unit.score(found[objective.index]) if found and objective.index < len(found) else MISSING


def interval(candidate: Candidate, objective: ObjectiveView) -> str:
    """Its interval, such as "[70.1, 78.3]"; empty where there is none."""
    found = candidate.interval(objective)
    return f"[{', '.join(objective.unit.score(end) for end in found)}]" if found else ""


def notes(tested: TestedView, view: SearchView) -> str:
    """What a tested configuration is, in words below its name."""
    found = []
    if tested.kind == "control":
        found += ["best control"] if tested.name == view.best_control else []
        found += ["the recipe as it stands"] if tested.name == view.name else []
        return ", ".join(found)
    if tested.kind == "random":
        found.append("best of the random arm")
    elif tested.name == view.winner:
        found.append("winner")
    elif tested.name in view.front:
        found.append("on the front")
    candidate = next((c for c in view.candidates if c.name == tested.name), None)
    found += values(candidate) if candidate else []
    return ", ".join([*found, *([f"same weights as {tested.twin}"] if tested.twin else [])])


def difference(tested: TestedView, view: SearchView, objective: ObjectiveView) -> float | None:
    """From the best control on test items, above zero is better: the paired one, or of a control the difference of two scores."""
    found = tested.against[objective.index]
    if found is not None:
        return found.diff
    best = view.row(view.best_control, "control")
    ends = (tested.test[objective.index], best.test[objective.index] if best else None)
    if ends[0] is None or ends[1] is None or tested is best:
        return None
    return (ends[1] - ends[0]) if objective.lower else (ends[0] - ends[1])


def facts(view: SearchView) -> list[tuple[str, str]]:
    """Terms and texts of the list at the end; absent ones are left out."""
    halves = [(count(n), word) for n, word in ((view.search_items, "to search"), (view.test_items, "to test")) if n is not None]
    spent = [c.seconds for c in view.candidates if c.seconds is not None]
    prov = view.comparison.provenance if view.comparison else {}
    found = [
        ("Objective" if len(view.objectives) == 1 else "Objectives", "; ".join(_objective(o) for o in view.objectives)),
        ("Space", "; ".join(domain(d.name, view) for d in view.dimensions)),
        ("Sampler", view.sampler + (f", seed {view.seed}" if view.sampler and view.seed is not None else "")),
        ("Items", ", ".join(f"{n} {word}" for n, word in halves)),
        ("Stages", f"compared after {listed(count(n) for n in _sums(view.stages))} items" if len(view.stages) > 1 else ""),
        ("Time in candidates", seconds(sum(spent)) if spent else ""),
        ("Folder", view.directory),
        ("Key", view.key),
        ("Device", str(prov.get("device") or "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (prov.get("versions") or {}).items())),
    ]
    return [(term, text) for term, text in found if text]


def domain(name: str, view: SearchView) -> str:
    """A dimension and what it may be: "mix.lambda 0.4 to 1.4", "mix.merge ties or task_arithmetic"."""
    d = next(d for d in view.dimensions if d.name == name)
    if not d.numeric:
        return f"{name} {', '.join(d.choices[:-1])} or {d.choices[-1]}"
    return f"{name} {written(d.low)} to {written(d.high)}{' (logarithmic)' if d.log else ''}"


def _unbeaten(view: SearchView) -> str:
    """The result of a search whose candidates were all given up."""
    if len(view.objectives) > 1:
        return (
            f"No candidate beats {listed(_called(u) for u in view.unbeaten)}: on every objective, each that was scored fell behind one of "
            "them on search items."
        )
    (objective,), best = view.objectives, view.unbeaten[0]
    return (
        f"No candidate beats {_called(best)}, which has {_level(objective, best.search[0])} on search items and "
        f"{_level(objective, best.test[0])} on {_items(objective.test_items, 'test item')} that no candidate saw."
    )


def _called(found: Unbeaten) -> str:
    """A control with what it is, as sentences name it."""
    roles = {
        "base": "the base" if found.name == "base" else f"the base {found.name}",
        "brick": f"brick {found.name}",
        "average": f"the control {found.name}",
        "configuration": f"the untuned recipe {found.name}",
        "random": f"{found.name} of the random arm",
    }
    return roles.get(found.role, found.name)


def _beside(view: SearchView, tested: TestedView, objective: ObjectiveView) -> str:
    index = objective.index
    text = f"{tested.name} has {_level(objective, tested.test[index])}"
    best, found = view.row(view.best_control, "control"), tested.against[index]
    if best is None or found is None:
        return f"{text} on {objective.name}. No control was scored beside it."
    if tested.twin == best.name:
        return f"{text}: the winner is the best control, {best.name}, under another name, since their weights are equal."
    twin = f" The winner is the control {tested.twin} under another name: their weights are equal." if tested.twin else ""
    return f"{text} and the best control, {best.name}, {_level(objective, best.test[index])}: {_ruled(objective, found)}.{twin}"


def _ruled(objective: ObjectiveView, found: Against) -> str:
    """The difference and its verdict, and why it cannot tell where the interval does not show it."""
    if found.verdict == "no item changed":
        return "no item changed"
    few = f" ({found.reason})" if found.reason and "cluster" in found.reason else ""
    return f"{gap(objective, found)}, {found.verdict or MISSING}{few}"


def _level(objective: ObjectiveView, value: float | None) -> str:
    shown = objective.unit.score(value)
    return f"{shown}{NBSP}%" if objective.unit.word == "points" else shown


def _optimism(view: SearchView, tested: TestedView, objective: ObjectiveView) -> str:
    found = tested.against[objective.index]
    if found is None or found.search is None or found.optimism is None or tested.twin == view.best_control:
        return ""
    unit = objective.unit
    size = f"{unit.score(abs(found.optimism))} {unit.word}".rstrip()
    same = unit.diff(found.optimism) == unit.diff(0.0)
    tail = "as on the test items" if same else f"{size} {'above' if found.optimism > 0 else 'below'} that on the test items"
    better = "the search items flattered it by that much" if found.optimism > 0 else "the search items did not flatter it"
    return f"On the search items, by which it was chosen, its difference was {unit.worded(found.search)}, {tail}{'' if same else ': ' + better}."


def _verdicts(view: SearchView, chosen: Sequence[TestedView], objective: ObjectiveView) -> str:
    """Of a front: which members are better than the best control under one objective."""
    groups: dict[str, list[str]] = {}
    for t in chosen:
        found = t.against[objective.index]
        if found is not None:
            same = found.verdict == "no item changed"
            told = t.name if same else f"{t.name} ({objective.unit.diff(found.diff)})"
            groups.setdefault(found.verdict or MISSING, []).append(told)
    words = {
        "better": f"better than {view.best_control}: ",
        "worse": f"worse than {view.best_control}: ",
        "no item changed": f"with no item changed from {view.best_control}: ",
    }
    order = [*words, *(v for v in groups if v not in words)]
    clauses = [words.get(v, f"{v}: ") + listed(groups[v]) for v in order if v in groups]
    return f"On {objective.name}, {'; '.join(clauses)}." if clauses else ""


def _random(view: SearchView) -> str:
    best = next((t for t in view.tested if t.kind == "random"), None)
    if best is None:
        return ""
    told = []
    for o in view.objectives:
        found = best.against[o.index]
        on = f" on {o.name}" if len(view.objectives) > 1 else ""
        against = f" (against {view.best_control}: {_ruled(o, found)})" if found and found.diff is not None else ""
        told.append(f"{_level(o, best.test[o.index])}{on}{against}")
    return f"The best random candidate, {best.name}, has {listed(told)} on test items."


def _objective(o: ObjectiveView) -> str:
    return f"{o.name}, {o.direction}" + (
        f": mean of {', '.join(o.terms)}" if len(o.terms) > 1 else f": {o.terms[0]}" if o.terms else ""
    )


def _items(n: int | None, word: str) -> str:
    return plural(n, word) if n is not None else f"{word}s"


def _sums(stages: Sequence[int]) -> list[int]:
    return [sum(stages[: i + 1]) for i in range(len(stages))]
