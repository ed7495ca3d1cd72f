"""The result of a search: the winner tested on items that no candidate has seen, its recipe, and the document that reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workbench.compare import compare
from workbench.controls import Entry
from workbench.errors import WorkbenchError
from workbench.scores import Configuration, Scores, write_whole
from workbench.search.objective import Answers, Gap, Objective, gap
from workbench.search.race import Rival, front
from workbench.search.run import Search, candidate, finished, open_study, values_of
from workbench.search.space import Values
from workbench.search.study import Study
from workbench.weights.digests import write_json

RESULT = "search.json"
SHOWN = 8
"""Members of a front that are tested, at most."""


@dataclass(frozen=True)
class _Tested:
    """A configuration on both halves of the items."""

    rival: Rival
    entry: Entry
    configuration: Configuration
    answers: Answers


def conclude(search: Search, out: Path | None = None) -> dict[str, Any]:
    """Test the best candidates beside all controls, write their recipes and the search's document; returns the document.

    Args:
        out: Also write the winner's recipe there.

    Errors: no candidate has been scored in full.
    """
    study = open_study(search)
    try:
        chosen = _chosen(search, study)
        values = {rival.name: values_of(search, study, rival.name) for rival in chosen}
        entries = {**search.entries, **{rival.name: candidate(search, rival.name, values[rival.name]) for rival in chosen}}
        tested = []
        for number, rival in enumerate([*search.controls, *chosen], 1):
            search.events({"stage": "search", "text": f"test {number}/{len(search.controls) + len(chosen)}: {rival.name}"})
            tested.append(_Tested(rival, entries[rival.name], *search.bench.test(entries[rival.name])))
        recipes = {name: _write(search, name, values[name], len(search.objectives) == 1) for name in values if not name.startswith("random")}
        document = _document(search, study, tested, values, recipes)
        if out is not None and document["winner"]:
            write_whole(out, Path(recipes[document["winner"]]).read_bytes())
        write_json(search.folder / RESULT, document, indent=1)
        return document
    finally:
        study.close()


def _chosen(search: Search, study: Study) -> list[Rival]:
    """The winner, or the front of several objectives, and the best of the random arm."""
    found = front(finished(search, study, ("search",)))[:SHOWN]
    if not found:
        raise WorkbenchError(
            f"{search.recipe.name}: no candidate has seen all search items: {len(study.finished('search'))} were begun",
            "Give the search more `trials` or `budget`.",
        )
    return found + front(finished(search, study, ("random",)))[:1]


def _write(search: Search, name: str, values: Values, alone: bool) -> str:
    """A candidate as a recipe of its own, beside the study."""
    path = search.folder / ("winner.yaml" if alone else f"{name}.yaml")
    data = search.space.document(values, f"{search.recipe.name}-{name}")
    shown = ", ".join(f"{key} {value}" for key, value in values.items())
    source = search.recipe.path.name if search.recipe.path else search.recipe.name
    head = f"# workbench run {_relative(path)}\n# {name} of the search in {source}: {shown}\n"
    write_whole(path, (head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).encode())
    return str(path)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _document(
    search: Search, study: Study, tested: Sequence[_Tested], values: Mapping[str, Values], recipes: Mapping[str, str]
) -> dict[str, Any]:
    """The `search --json` document."""
    names = [t.rival.name for t in tested]
    controls = [t for t in tested if t.rival.name in search.entries]
    found = [t for t in tested if t.rival.name in values and not t.rival.name.startswith("random")]
    # Chosen on search items, before any test item is looked at.
    best_control = max(controls, key=lambda t: sum(t.rival.scores)) if controls else None
    single = len(search.objectives) == 1
    return {
        "version": 1, "name": search.recipe.name, "key": search.key, "directory": str(search.folder.relative_to(search.recipe.project)) if search.folder.is_relative_to(search.recipe.project) else search.folder.name, "sampler": search.sampler,
        "seed": search.recipe.fields.seed, "objectives": [{"name": o.name, "lower": o.lower, "terms": [[*t.key, t.metric] for t in o.terms]} for o in search.objectives],
        "space": {d.name: d.domain.model_dump(mode="json") for d in search.space.dimensions},
        "items": search.stages.items, "stages": [sum(len(i) for p in stage for i in p.items.values()) for stage in search.stages.search],
        "controls": [_control(search, rival) for rival in search.controls],
        "trials": [_trial(search, r) for arm in ("search", "random") for r in study.finished(arm)],  # type: ignore[arg-type]
        "importances": dict(zip([o.name for o in search.objectives], study.importances(), strict=True)),
        "winner": found[0].rival.name if single else None, "recipes": dict(recipes), "best_control": best_control and best_control.rival.name,
        "test": {
            "baseline": best_control and best_control.rival.name,
            "rows": [_row(search, t, best_control) for t in tested],
            "against": {t.rival.name: _against(search.objectives, best_control, t) for t in tested if t in found or t.rival.name not in search.entries} if best_control else {},
            "comparison": _compared(search, tested, best_control or tested[0]),
        },
        **({} if single else {"front": [t.rival.name for t in found], "hypervolume": hypervolumes(search, study)}),
        "names": names,
    }  # fmt: skip


def _control(search: Search, rival: Rival) -> dict[str, Any]:
    return {"name": rival.name, "scores": _shown(search.objectives, rival.scores)}


def _trial(search: Search, record: Mapping[str, Any]) -> dict[str, Any]:
    scores = record["scores"]
    return {**record, "scores": None if scores is None else _shown(search.objectives, scores)}


def _shown(objectives: Sequence[Objective], scores: Sequence[float]) -> list[float]:
    return [round(o.shown(s), 6) for o, s in zip(objectives, scores, strict=True)]


def _row(search: Search, tested: _Tested, best_control: _Tested | None) -> dict[str, Any]:
    """A configuration on search and test items, and how much better it looked on the former, beside the best control."""
    search_scores, test_scores = tested.rival.scores, tuple(tested.answers.value(o) for o in search.objectives)
    row: dict[str, Any] = {"name": tested.rival.name, "digest": tested.configuration.digest, "search": _shown(search.objectives, search_scores),
                           "test": _shown(search.objectives, test_scores)}  # fmt: skip
    if best_control is not None:
        before = [gap(best_control.rival.answers, tested.rival.answers, o).diff for o in search.objectives]
        after = [gap(best_control.answers, tested.answers, o).diff for o in search.objectives]
        row["optimism"] = [round(a - b, 6) for a, b in zip(before, after, strict=True)]
    return row


def _against(objectives: Sequence[Objective], control: _Tested, tested: _Tested) -> list[dict[str, Any]]:
    """For every objective the paired difference from the best control on test items, and on search items beside it."""
    found = []
    for objective in objectives:
        test, search = gap(control.answers, tested.answers, objective), gap(control.rival.answers, tested.rival.answers, objective)
        found.append({"objective": objective.name, "test": _gap(test), "search": _gap(search), "verdict": test.verdict(),
                      "optimism": round(search.diff - test.diff, 6)})  # fmt: skip
    return found


def _gap(found: Gap) -> dict[str, Any]:
    low, high = found.interval()
    finite = abs(low) < float("inf")
    return {"diff": round(found.diff, 6), "low": round(low, 6) if finite else None, "high": round(high, 6) if finite else None, "clusters": found.clusters}


def _compared(search: Search, tested: Sequence[_Tested], baseline: _Tested) -> dict[str, Any]:
    """The comparison of all tested configurations, task by task, on test items."""
    store = search.bench.store
    scores: list[Scores] = []
    for t in tested:
        for plan in search.stages.test:
            settled = store.settled(plan)
            scores.append(store.read(settled, t.configuration.digest).called(t.configuration))
    return compare(store, scores, baseline=baseline.configuration.name, project=search.recipe.project).document()


def hypervolumes(search: Search, study: Study) -> list[float]:
    """Of two objectives: the area that the front covers after each candidate, above the worst scores of the controls and candidates."""
    if len(search.objectives) != 2:
        return []
    rivals = {rival.name: rival for rival in finished(search, study)}
    points = [r.scores for r in search.controls]
    floor = [min(p[i] for p in [*points, *(r.scores for r in rivals.values())]) for i in range(2)]
    found = []
    for record in study.finished("search"):
        if record["name"] in rivals:
            points.append(rivals[record["name"]].scores)
        found.append(round(area(points, floor), 6))
    return found


def area(points: Sequence[Sequence[float]], floor: Sequence[float]) -> float:
    """Of what lies below some point in both coordinates and above the floor."""
    total, height = 0.0, floor[1]
    for x, y in sorted(points, key=lambda p: (-p[0], -p[1])):
        if y > height:
            total += (x - floor[0]) * (y - height)
            height = y
    return total
