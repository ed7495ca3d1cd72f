"""The end of a search: the best candidates and all controls are scored on test items, and recipes of the best ones are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from workbench import yamldoc
from workbench.errors import WorkbenchError, shell
from workbench.evaluate.lineup import LineupEntry
from workbench.files import write_bytes
from workbench.search.document import Tested, document
from workbench.search.objective import Rival, front
from workbench.search.result import RESULT, SearchResult, TestedPart, TrialRow
from workbench.search.run import Search, candidate, finished, open_study
from workbench.search.space import Values
from workbench.search.study import Study

SHOWN = 8
"""Maximum number of members of a Pareto front that are tested."""


def conclude(search: Search, out: Path | None = None) -> SearchResult:
    """Test the best candidates and all controls, and write the best candidates' recipes and the search's document.

    If every candidate was stopped early or loses too much on a guarded task, the document names the configurations that no candidate beats, and no recipe is written.

    Args:
        search: The search, with its controls scored.
        out: Additional path for the winner's recipe, or for that of the first member of the Pareto front.

    Returns:
        The result.

    Raises:
        WorkbenchError: If no candidate was scored, or the cache has lost the scores of the study's candidates.
    """
    study = open_study(search)
    try:
        # The process that writes last has read the study last: an older result never replaces a newer one.
        with FileLock(search.folder / "result.lock"):
            tested = _tested(search, study)
            recipes = {t.name: _write(search, t) for t in tested if t.part == "found"}
            result = document(search, study, tested, {name: search.shown(path) for name, path in recipes.items()})
            if out is not None and recipes:
                write_bytes(out, next(iter(recipes.values())).read_bytes())
            result.write(search.folder / RESULT)
            return result
    finally:
        study.close()


def _tested(search: Search, study: Study) -> list[Tested]:
    """Score the controls, the winner or the Pareto front, and the best random candidate on test items, in this order."""
    configurations: list[tuple[Rival, LineupEntry, TestedPart, Values | None]] = [
        (rival, search.entries[rival.name], "control", None) for rival in search.controls
    ]
    values: dict[str, Values] = {record.name: record.values for record in study.finished()}
    for rival, part in _best(search, study):
        configurations.append((rival, candidate(search, rival.name, values[rival.name]), part, values[rival.name]))
    tested = []
    for number, (rival, entry, part, candidate_values) in enumerate(configurations, 1):
        search.events({"stage": "search", "text": f"test {number}/{len(configurations)}: {rival.name}"})
        tested.append(Tested(rival, *search.bench.test(entry), part, candidate_values))
    return tested


def _best(search: Search, study: Study) -> list[tuple[Rival, TestedPart]]:
    """Return the winner or the Pareto front (none if all candidates were stopped early or lose too much on a guarded task), then the best random candidate."""
    done = study.finished("search")
    if not any(record.scores for record in done):
        raise _nothing(search, done)
    best = front(finished(search, study, "search"))[:SHOWN]
    if not best and not all(record.stopped or record.harmful for record in done if record.scores):
        raise WorkbenchError(
            f"{search.recipe.name}: the cache no longer has the scores of candidates in the study {search.shown(search.folder)}",
            "Move that folder away and run the search again.",
        )
    random: list[tuple[Rival, TestedPart]] = [(rival, "random") for rival in front(finished(search, study, "random"))[:1]]
    return [*((rival, "found") for rival in best), *random]


def _nothing(search: Search, done: Sequence[TrialRow]) -> WorkbenchError:
    """Return the error for a search without any scored candidate."""
    if not done:
        return WorkbenchError(
            f"{search.recipe.name}: no candidate was scored before the search ended",
            "Increase `trials` or `budget` of the search.",
        )
    return WorkbenchError(
        f"{search.recipe.name}: all {len(done)} candidates failed; {done[0].name}: {done[0].error}",
        "Restrict the search's `space` to values with which the merge works.",
    )


def _write(search: Search, tested: Tested) -> Path:
    """Write a candidate's recipe into the folder of the search and return its path."""
    assert tested.values is not None
    path = search.folder / ("winner.yaml" if len(search.objectives) == 1 else f"{tested.name}.yaml")
    data = search.space.document(tested.values, f"{search.recipe.name}-{tested.name}")
    values = ", ".join(f"{key} {value}" for key, value in tested.values.items())
    source = search.recipe.path.name if search.recipe.path else search.recipe.name
    header = f"# workbench run {shell(search.shown(path))}\n# {tested.name} of the search in {source}: {values}\n"
    write_bytes(path, (header + yamldoc.dump(data)).encode())
    return path
