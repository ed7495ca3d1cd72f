"""The greedy soup: candidates in the paper's order, beside a direct implementation; killed processes; several workers; bad spaces."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call
from worlds.project import Project
from worlds.search_world import searched

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.search.samplers import sampler_name
from workbench.search.space import Space
from workbench.search.study import Study

NAMES = ("one", "two", "full")
BRICKS = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\n"
WEIGHTS = ", ".join(f"mix.bricks.{name}: {{choices: [0, 1]}}" for name in NAMES)


def space_of(project: Project, dimensions: str = f"{{{WEIGHTS}}}") -> Space:
    step = "steps: [{id: mix, merge: linear, bricks: {one: 1, two: 1, full: 1}}]\n"
    return Space(load_recipe(project.write(searched(dimensions, ", sampler: greedy", BRICKS + step))))


def study_in(folder: Path, space: Space) -> Study:
    return Study(folder, space, sampler="greedy", objectives=1, key="a", lambdas=(0.3,))


def members(values: dict[str, Any]) -> frozenset[str]:
    return frozenset(name.rpartition(".")[2] for name, weight in values.items() if weight)


def run(study: Study, score: Callable[[frozenset[str]], float | None], number: int | None = None) -> list[frozenset[str]]:
    """Score candidates until there are none left, and return them in order."""
    while (trial := study.claim("search", number)) is not None:
        value = score(members(trial.values))
        study.finish(trial, None if value is None else [value], {"digest": trial.name})
    return [members(found.values) for found in study.finished("search")]


def soup(score: Callable[[frozenset[str]], float]) -> list[frozenset[str]]:
    """The candidates of recipe 1 of the paper, in its order."""
    tried = [frozenset([name]) for name in NAMES]
    order = sorted(NAMES, key=lambda name: score(frozenset([name])), reverse=True)
    best = frozenset(order[:1])
    for name in order[1:]:
        tried.append(best | {name})
        if score(best | {name}) >= score(best):
            best = best | {name}
    return tried


@pytest.mark.parametrize("seed", range(8))
def test_candidates_are_those_of_the_paper(project: Project, tmp_path: Path, seed: int) -> None:
    """Scores of all soups are drawn at random, in coarse steps so that ties occur."""
    draw = random.Random(seed)
    subsets = [frozenset(s) for n in range(1, 4) for s in itertools.combinations(NAMES, n)]
    scores = {subset: draw.randrange(4) / 4 for subset in subsets}
    study = study_in(tmp_path / "study", space_of(project))
    assert run(study, scores.__getitem__) == soup(scores.__getitem__)
    assert study.claim("search", None) is None


def test_a_brick_that_changes_nothing_stays(project: Project, tmp_path: Path) -> None:
    tried = run(study_in(tmp_path / "study", space_of(project)), lambda bricks: 0.5)
    assert tried[3:] == [{"one", "two"}, {"one", "two", "full"}]


def test_a_brick_that_fails_alone_comes_last_and_a_soup_that_fails_is_not_kept(project: Project, tmp_path: Path) -> None:
    def score(bricks: frozenset[str]) -> float | None:
        return None if bricks in ({"one"}, {"full", "two"}) else float(len(bricks)) + 0.1 * ("full" in bricks)

    tried = run(study_in(tmp_path / "study", space_of(project)), score)
    assert tried[3:] == [{"full", "two"}, {"full", "one"}]


def test_a_resumed_search_goes_on_where_the_last_one_ended(project: Project, tmp_path: Path) -> None:
    def score(bricks: frozenset[str]) -> float:
        return len(bricks) + 0.5 * ("two" in bricks)

    first = study_in(tmp_path / "study", space_of(project))
    assert len(run(first, score, number=4)) == 4
    first.claim("search", None)  # this candidate is never scored
    first.close()
    assert run(study_in(tmp_path / "study", space_of(project)), score) == soup(score)


def test_a_second_worker_waits_for_no_score_and_scores_nothing_twice(project: Project, tmp_path: Path) -> None:
    space = space_of(project)
    one, two = study_in(tmp_path / "study", space), study_in(tmp_path / "study", space)
    claimed = [study.claim("search", None) for study in (one, two, one)]
    assert [members(trial.values) for trial in claimed if trial] == [{name} for name in NAMES]
    assert two.claim("search", None) is None, "the soup needs the scores of the single bricks"


@pytest.mark.parametrize(
    ("dimensions", "says"),
    [
        ("{mix.bricks.one: [0, 1], mix.bricks.two: {choices: [0, 1]}}", "mix.bricks.one has others"),
        ("{mix.bricks.one: {choices: [1, 0]}, mix.bricks.two: {choices: [0, 1]}}", "mix.bricks.one has others"),
        ("{mix.bricks.one: {choices: [0, 1, 2]}, mix.bricks.two: {choices: [0, 1]}}", "mix.bricks.one has others"),
        ("{mix.bricks.one: {choices: [0, 1]}}", "needs two or more dimensions"),
    ],
)
def test_spaces_that_are_no_soup_are_refused(project: Project, dimensions: str, says: str) -> None:
    with pytest.raises(WorkbenchError, match=says):
        sampler_name(space_of(project, dimensions), 1)


def test_several_objectives_are_refused(project: Project) -> None:
    with pytest.raises(WorkbenchError, match="several objectives"):
        sampler_name(space_of(project), 2)


def test_the_command_finds_the_best_soup(world: Project) -> None:
    """`search` scores the single bricks, then the soups, and the winner's recipe has weights of 0 and 1 alone."""
    weights = "{mix.bricks.one: {choices: [0, 1]}, mix.bricks.two: {choices: [0, 1]}}"
    step = (
        "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{id: mix, merge: linear, bricks: {one: 1, two: 1}}]\neval: [words]\n"
    )
    recipe = world.write(searched(weights, recipe=step, rest=", sampler: greedy"))
    found = json.loads(call("search", str(recipe), "--device", "cpu", "--json").stdout)
    tried = [members(row["values"]) for row in found["trials"] if row["arm"] == "search"]
    assert tried[:2] == [{"one"}, {"two"}]
    assert tried[2:] == [{"one", "two"}]
