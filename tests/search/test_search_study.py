"""The study on disk: whose journal it is, and what is left of a process that died."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file, save_file

from worlds.project import Project
from worlds.search_world import searched

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.search.result import TrialRow
from workbench.search.run import Scoring, Search, open_study, prepare
from workbench.search.space import Space
from workbench.search.study import JOURNAL, Study

BRICKS = "bricks: {one: bricks/one, two: bricks/two}\n"
RECIPES = {
    "numbers": ("{mix.lambda: [0.2, 1.2], mix.density: [0.1, 0.9], mix.bricks.two: [0, 1]}", "ties, density: 0.5"),
    "methods": ("{mix.merge: [ties, task_arithmetic], mix.lambda: [0.2, 1.2], mix.density: [0.1, 0.9]}", "ties, density: 0.5"),
}
SAMPLERS = [
    ("random", "numbers", 1),
    ("tpe", "numbers", 1),
    ("tpe", "methods", 1),
    ("cmaes", "numbers", 1),
    ("nsga2", "numbers", 2),
]


def space_of(project: Project, recipe: str) -> Space:
    dimensions, method = RECIPES[recipe]
    return Space(load_recipe(project.write(searched(dimensions, "", f"{BRICKS}steps: [{{id: mix, merge: {method}}}]\n"))))


def study_in(folder: Path, space: Space, sampler: str, objectives: int = 1, key: str = "a") -> Study:
    return Study(folder, space, sampler=sampler, objectives=objectives, key=key, lambdas=(0.3, 0.6))


class Killed(BaseException):
    """The process is dead: no handler of errors runs."""


def work(folder: Path, space: Space, sampler: str, objectives: int, number: int) -> list[TrialRow]:
    """Score candidates by a formula until there are `number`; a process that dies lets its lock go and writes nothing more."""
    study = study_in(folder, space, sampler, objectives)
    try:
        while (trial := study.claim("search", number)) is not None:
            values = [v for v in trial.values.values() if isinstance(v, float)]
            study.finish(trial, [sum(v * v for v in values) + i * values[0] for i in range(objectives)], {"digest": trial.name})
    except Killed:
        study._alive.release()
        raise
    found = study.finished("search")
    study.close()
    return found


def killing(real: Callable[..., Any], last: int, late: bool) -> Callable[..., Any]:
    seen = 0

    def append(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        nonlocal seen
        seen += 1
        if seen == last and not late:
            raise Killed
        real(self, logs)
        if seen == last:
            raise Killed

    return append


@pytest.mark.parametrize("number", [3, 12], ids=["first", "last"])
@pytest.mark.parametrize(("sampler", "recipe", "objectives"), SAMPLERS, ids=lambda value: str(value))
def test_a_process_that_dies_at_any_write_changes_no_candidate(
    sampler: str, recipe: str, objectives: int, number: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the first writes to the journal, and each write of the last candidate, is once the last one of its process."""
    space, real = space_of(project, recipe), JournalFileBackend.append_logs
    writes: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", lambda self, logs: (writes.append(1), real(self, logs))[1])
        undisturbed = work(project.path / "plain", space, sampler, objectives, number)
    assert [t.number for t in undisturbed] == list(range(number))
    assert all(t.scores for t in undisturbed)
    for last in range(1, 17) if number == 3 else range(len(writes) - 7, len(writes) + 1):
        folder = project.path / f"killed-{last}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(JournalFileBackend, "append_logs", killing(real, last, late=last % 2 == 0))
            work(folder, space, sampler, objectives, number)
        assert work(folder, space, sampler, objectives, number) == undisturbed, f"killed at write {last} of {len(writes)}"
        shutil.rmtree(folder)


def test_a_candidate_belongs_to_its_process_until_that_ends(project: Project) -> None:
    """Another process takes a candidate over only when its owner's lock is free; it then keeps its number and its values."""
    space = space_of(project, "numbers")
    first, second = (study_in(project.path / "study", space, "random") for _ in range(2))
    mine = first.claim("random", 3)
    assert mine is not None
    beside = second.claim("random", 3)
    assert beside is not None
    assert (mine.number, beside.number) == (0, 1), "the first process lives: its candidate stays its own"
    second.finish(beside, [0.5], {})
    first._alive.release()  # what the end of a process does, however it ends
    taken = second.claim("random", 3)
    assert taken is not None
    assert (taken.number, taken.values) == (0, mine.values)
    second.finish(taken, [0.25], {})
    last = second.claim("random", 3)
    assert last is not None
    assert last.number == 2
    second.finish(last, None, {"error": "x"})
    assert second.claim("random", 3) is None
    assert [(t.number, t.scores) for t in second.finished("random")] == [(0, [0.25]), (1, [0.5]), (2, None)]


def test_a_line_that_was_cut_in_the_middle_is_dropped(project: Project) -> None:
    """A full disk cuts the last line of a journal: the search goes on from the line before it."""
    space, folder = space_of(project, "numbers"), project.path / "study"
    whole = work(folder, space, "random", 1, 4)
    journal = folder / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-9]) + lines[-9][:17])
    assert work(folder, space, "random", 1, 4) == whole
    assert work(folder, space, "random", 1, 6)[:4] == whole


def test_a_process_goes_on_behind_a_line_that_another_one_was_killed_in(project: Project) -> None:
    space, folder = space_of(project, "numbers"), project.path / "study"
    alive = study_in(folder, space, "random")
    mine = alive.claim("random", 2)
    assert mine is not None
    with (folder / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":5,"worker_id":"killed')
    alive.finish(mine, [0.5], {})
    assert [(t.number, t.scores) for t in study_in(folder, space, "random").finished("random")] == [(0, [0.5])]


# -- whose journal it is


PLAIN = "{mix.lambda: [0.2, 1.6]}"
FACTS = {
    "space": (searched("{mix.lambda: [0.2, 1.5]}"), {}),
    "dimension": (searched("{mix.lambda: [0.2, 1.6], mix.density: [0.1, 0.9]}"), {}),
    "sampler": (searched(PLAIN, ", sampler: tpe"), {}),
    "seed": (searched(PLAIN, "}\nseed: 7  # {"), {}),
    "objective": (searched(PLAIN, ", objective: [words/pick]"), {}),
    "test share": (searched(PLAIN, ", test: 0.25"), {}),
    "a field that is not searched": (searched(PLAIN).replace("density: 0.5", "density: 0.6"), {}),
    "a brick less": (searched(PLAIN).replace("{one: bricks/one, two: bricks/two}", "{one: bricks/one}"), {}),
    "dtype": (searched(PLAIN).replace("float32", "bfloat16"), {}),
    "items": (searched(PLAIN), {"scoring": Scoring("cpu", limit=20)}),
}


def searching(world: Project, text: str, scoring: Scoring | None = None, **options: Any) -> Search:
    return prepare(load_recipe(world.write(text)), world.path / "runs", scoring or Scoring("cpu"), **options)


def begun(search: Search) -> Path:
    """The journal of a search that has scored one candidate."""
    study = open_study(search)
    trial = study.claim("random", 1)
    assert trial is not None
    study.finish(trial, [0.9] * len(search.objectives), {"digest": "0", "stopped": True})
    study.close()
    return study.file


@pytest.mark.parametrize("name", FACTS)
def test_everything_that_decides_scores_is_part_of_the_key(name: str, world: Project) -> None:
    search = searching(world, searched(PLAIN))
    text, options = FACTS[name]
    assert searching(world, text, **options).key != search.key


@pytest.mark.parametrize("name", ["base", "bricks/two"])
def test_other_weights_are_another_search(name: str, world: Project) -> None:
    """One number of the base or of a brick: the journal of the search before is neither gone on with nor accepted by name."""
    own = world.path / name.partition("/")[0]
    shared = own.resolve()
    own.unlink()
    shutil.copytree(shared, own)
    search = searching(world, searched(PLAIN))
    journal = begun(search)
    (file,) = (world.path / name).glob("*.safetensors")
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    other = searching(world, searched(PLAIN))
    assert other.key != search.key
    assert other.folder != search.folder
    study = open_study(other)
    assert study.finished() == []
    study.close()
    shutil.copyfile(journal, other.folder / JOURNAL)
    with pytest.raises(WorkbenchError, match="the file has the candidates of another search"):
        open_study(other)


def test_more_candidates_are_the_same_search(world: Project) -> None:
    """How many candidates there are, and how long it takes, decides no score."""
    search = searching(world, searched(PLAIN, ", trials: 2"))
    for rest in (", trials: 9", ", budget: 1h", ", trials: 2, random: 3"):
        assert searching(world, searched(PLAIN, rest)).key == search.key
