"""The end of a search: the best candidates beside all controls on items that no candidate has seen, and their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import yamldoc
from workbench.errors import WorkbenchError, shell
from workbench.evaluate.lineup import LineupEntry
from workbench.files import write_bytes, write_json
from workbench.search.document import document
from workbench.search.race import Rival, front
from workbench.search.run import Search, candidate, finished, open_study
from workbench.search.space import Values
from workbench.search.study import Study
from workbench.search.tested import Tested

RESULT = "search.json"
SHOWN = 8
"""Members of a front that are tested, at most."""


def conclude(search: Search, out: Path | None = None) -> dict[str, Any]:
    """Test the best candidates beside all controls, write their recipes and the search's document; returns the document.

    Where every candidate fell behind a control, the document says which control none of them beats, and no recipe is written.

    Args:
        out: Also write the winner's recipe there; of several objectives the first one of the front.

    Errors: no candidate has been scored.
    """
    study = open_study(search)
    try:
        tested = _tested(search, study)
        recipes = {t.name: _write(search, t) for t in tested if t.part == "found"}
        found = document(search, study, tested, {name: search.shown(path) for name, path in recipes.items()})
        if out is not None and recipes:
            write_bytes(out, next(iter(recipes.values())).read_bytes())
        write_json(search.folder / RESULT, found, indent=1)
        return found
    finally:
        study.close()


def _tested(search: Search, study: Study) -> list[Tested]:
    """Controls, then what the search has found, then the best of the random arm."""
    wanted: list[tuple[Rival, LineupEntry, str, Values | None]] = [
        (rival, search.entries[rival.name], "control", None) for rival in search.controls
    ]
    values: Mapping[str, Values] = {record["name"]: record["values"] for record in study.finished()}
    for rival, part in _best(search, study):
        wanted.append((rival, candidate(search, rival.name, values[rival.name]), part, values[rival.name]))
    found = []
    for number, (rival, entry, part, drawn) in enumerate(wanted, 1):
        search.events({"stage": "search", "text": f"test {number}/{len(wanted)}: {rival.name}"})
        found.append(Tested(rival, *search.bench.test(entry), part, drawn))
    return found


def _best(search: Search, study: Study) -> list[tuple[Rival, str]]:
    """The winner, or the front of several objectives; none where all were given up. Then the best of the random arm."""
    done = study.finished("search")
    if not any(record["scores"] for record in done):
        raise _nothing(search, done)
    found = front(finished(search, study, "search"))[:SHOWN]
    if not found and not all(record.get("stopped") for record in done if record["scores"]):
        raise WorkbenchError(
            f"{search.recipe.name}: the cache no longer has the scores of candidates that the study in {search.shown(search.folder)} holds",
            "Move that folder away: the search then begins again.",
        )
    return [
        *((rival, "found") for rival in found),
        *((rival, "random") for rival in front(finished(search, study, "random"))[:1]),
    ]


def _nothing(search: Search, done: Sequence[Mapping[str, Any]]) -> WorkbenchError:
    """No candidate has a score."""
    if not done:
        return WorkbenchError(
            f"{search.recipe.name}: no candidate has been scored: none was finished in time",
            "Give the search more `trials` or `budget`.",
        )
    return WorkbenchError(
        f"{search.recipe.name}: no candidate could be scored, {len(done)} failed; {done[0]['name']}: {done[0].get('error')}",
        "Narrow the search's `space` to values with which the merge can be computed.",
    )


def _write(search: Search, tested: Tested) -> Path:
    """A candidate as a recipe of its own, beside the study."""
    assert tested.values is not None
    path = search.folder / ("winner.yaml" if len(search.objectives) == 1 else f"{tested.name}.yaml")
    data = search.space.document(tested.values, f"{search.recipe.name}-{tested.name}")
    shown = ", ".join(f"{key} {value}" for key, value in tested.values.items())
    source = search.recipe.path.name if search.recipe.path else search.recipe.name
    head = f"# workbench run {shell(search.shown(path))}\n# {tested.name} of the search in {source}: {shown}\n"
    write_bytes(path, (head + yamldoc.dump(data)).encode())
    return path
