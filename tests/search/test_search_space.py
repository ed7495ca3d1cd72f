"""Dimensions: which fields they reach, what candidates look like as recipes, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from worlds.project import Project
from worlds.search_world import searched

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.search import samplers
from workbench.search.samplers import grid, sampler_name, starts
from workbench.search.space import Space

THREE = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"


def space(project: Project, dimensions: str, steps: str = "[{id: mix, merge: ties, density: 0.5}]", rest: str = "") -> Space:
    text = searched(dimensions, rest, f"{THREE}steps: {steps}\n")
    return Space(load_recipe(project.write(text)))


def steps(found: Space, values: dict[str, Any]) -> Any:
    return found.document(values)["steps"]


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2"])
def test_samplers_warn_users_of_nothing(name: str, project: Project) -> None:
    found = space(project, "{mix.lambda: [0.2, 1.2]}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(samplers).make_sampler(name, found, 0, 0, guarded=True)
    assert not caught


def test_fields_of_a_step(project: Project) -> None:
    found = space(project, "{mix.lambda: [0.2, 1.2], mix.density: [0.1, 0.9], seed: [0, 9], mix.sign: [mass, frequency]}")
    assert found.written() == {"mix.lambda": 1.0, "mix.density": 0.5, "seed": 0, "mix.sign": "mass"}
    assert [d.whole for d in found.dimensions] == [False, False, True, False]
    values = {"mix.lambda": 0.25, "mix.density": 0.5, "seed": 3, "mix.sign": "frequency"}
    data = found.document(values, "candidate")
    assert data["steps"] == [{"id": "mix", "merge": "ties", "density": 0.5, "lambda": 0.25, "sign": "frequency"}]
    assert (data["seed"], data["name"], "search" in data) == (3, "candidate", False)
    assert found.recipe_of(values).fields.seed == 3
    assert "lambda" not in found.plain["steps"][0], "the recipe itself stays"


def test_weights_of_bricks(project: Project) -> None:
    """A step that lists no bricks takes all: the others keep weight 1."""
    found = space(project, "{mix.bricks.two: [0, 1]}")
    assert steps(found, {"mix.bricks.two": 0.5})[0]["bricks"] == {"one": 1.0, "two": 0.5, "three": 1.0}
    assert found.written() == {"mix.bricks.two": 1.0}
    listed = "[{id: mix, merge: ties, bricks: {one: 0.5, two: {weight: 0.7, density: 0.3}}}]"
    found = space(project, "{mix.bricks.two: [0, 1], mix.bricks.one.density: [0.1, 0.9]}", listed)
    assert steps(found, {"mix.bricks.two": 0.2, "mix.bricks.one.density": 0.4})[0]["bricks"] == {
        "one": {"weight": 0.5, "density": 0.4}, "two": {"weight": 0.2, "density": 0.3}}  # fmt: skip


def test_knots_of_a_schedule(project: Project) -> None:
    found = space(project, "{mix.lambda.knots.0: [0, 2], mix.lambda.knots.2: [0, 2]}", "[{id: mix, merge: ties, lambda: 0.8}]")
    assert steps(found, {"mix.lambda.knots.0": 0.1, "mix.lambda.knots.2": 1.5})[0]["lambda"] == {"knots": [0.1, 0.8, 1.5]}
    assert found.written() == {"mix.lambda.knots.0": 0.8, "mix.lambda.knots.2": 0.8}
    given = "[{id: mix, merge: ties, lambda: {knots: [1, 2, 3]}}]"
    assert steps(space(project, "{mix.lambda.knots.1: [0, 4]}", given), {"mix.lambda.knots.1": 0.5})[0]["lambda"] == {
        "knots": [1, 0.5, 3]
    }


def test_dimensions_of_one_method(project: Project) -> None:
    """Fields that the chosen method does not have are neither drawn nor written."""
    found = space(project, "{mix.density: [0.1, 0.9], mix.bricks.one: [0, 1], mix.merge: [ties, task_arithmetic, average]}")
    assert found.conditional
    assert found.names == ["mix.merge", "mix.density", "mix.bricks.one"]
    active = {m: [d.name for d in found.active({"mix.merge": m})] for m in ("ties", "task_arithmetic", "average")}
    assert active == {"ties": found.names, "task_arithmetic": ["mix.merge", "mix.bricks.one"], "average": ["mix.merge"]}
    assert steps(found, {"mix.merge": "task_arithmetic", "mix.bricks.one": 0.5}) == [
        {"id": "mix", "merge": "task_arithmetic", "bricks": {"one": 0.5, "two": 1.0, "three": 1.0}}]  # fmt: skip
    assert steps(found, {"mix.merge": "average"}) == [{"id": "mix", "merge": "average"}]
    assert not space(project, "{mix.lambda: [0, 1], mix.merge: [ties, dare]}").conditional


REFUSED = {
    "no such field": ("{mix.lamda: [0, 1]}", r"search.space.mix.lamda: no method of its step has a field 'lamda'", "'lambda'"),
    "no such step": ("{mux.lambda: [0, 1]}", r"no step or field 'mux'. Did you mean 'mix'\?", ""),
    "a step alone": ("{mix: [0, 1]}", r"this is a step; add one of its fields", ""),
    "no such method": ("{mix.merge: [ties, tyes]}", r"unknown merge method 'tyes'. Did you mean 'ties'\?", ""),
    "no such brick": ("{mix.bricks.four: [0, 1]}", r"no brick 'four' under `bricks`", ""),
    "an end outside": ("{mix.density: [0.1, 2]}", r"density: expected a share between 0 and 1, found 2", ""),
    "words for a number": ("{mix.lambda: [a, b]}", r"lambda: expected a valid number, found 'a'", ""),
    "half a seed": ("{seed: [0.5, 2]}", r"seed: expected a valid integer, found 0.5", ""),
    "empty range": ("{mix.lambda: [1, 1]}", r"expected low < high, found 1 and 1: an empty range", ""),
    "one choice": ("{mix.merge: [ties]}", r"expected at least 2 entries", ""),
    "no dimension": ("{}", r"search.space: expected at least 1 entries", ""),
    "log of nothing": ("{mix.lambda: {low: 0, high: 1, log: true}}", r"`log` needs low > 0", ""),
    "no time": ("{mix.lambda: [0, 1]}, budget: 2 days", r"expected a time such as 90s, 30m or 2h", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, project: Project) -> None:
    dimensions, message, hint = REFUSED[name]
    with pytest.raises(WorkbenchError, match=message) as error:
        space(project, dimensions)
    assert hint in str(error.value.hint)
    assert error.value.exit_code == 2
    assert "test.yaml:" in error.value.message, "the place in the file"


def test_samplers(project: Project) -> None:
    knots = ", ".join(f"mix.lambda.knots.{i}: [0, 1]" for i in range(21))
    one = space(project, "{mix.lambda: [0, 1]}")
    assert (sampler_name(one, 1), sampler_name(one, 3), sampler_name(one, 4)) == ("gp", "gp", "nsga2")
    assert sampler_name(space(project, f"{{{knots}}}"), 1) == "cmaes"
    assert sampler_name(space(project, f"{{{knots}}}"), 2) == "nsga2"
    assert sampler_name(space(project, "{" + knots.partition(", mix.lambda.knots.9")[0] + "}"), 1) == "tpe"
    split = "{mix.merge: [ties, average], mix.density: [0, 1]}"
    assert sampler_name(space(project, split), 1) == "tpe"
    for asked, dimensions, message in [
        ("gp", split, "gp needs dimensions that every method has"), ("grid", "{mix.lambda: [0, 1]}", "grid needs a `step`"),
        ("cmaes", "{mix.sign: [mass, frequency]}", "cmaes supports only one objective"),
    ]:  # fmt: skip
        with pytest.raises(WorkbenchError, match=message):
            sampler_name(space(project, dimensions, rest=f", sampler: {asked}"), 1)
    points = grid(space(project, "{mix.lambda: {low: 0, high: 1, step: 0.25}, seed: [0, 2], mix.sign: [mass, frequency]}"))
    assert points == {"mix.lambda": [0.0, 0.25, 0.5, 0.75, 1.0], "seed": [0, 1, 2], "mix.sign": ["mass", "frequency"]}


def test_what_is_tried_first(project: Project) -> None:
    """The recipe as it stands, and other lambdas that lie inside."""
    assert starts(space(project, "{mix.lambda: [0.5, 1.2], mix.density: [0.1, 0.9]}"), (0.3, 0.6, 1.0)) == [
        {"mix.lambda": 1.0, "mix.density": 0.5}, {"mix.lambda": 0.6, "mix.density": 0.5}]  # fmt: skip
    assert starts(space(project, "{mix.lambda: [2, 3]}"), (0.3,)) == [], "the recipe lies outside"
    assert starts(space(project, "{mix.merge: [ties, task_arithmetic, dare], mix.density: [0.1, 0.9]}"), ()) == [
        {"mix.merge": "ties", "mix.density": 0.5}, {"mix.merge": "task_arithmetic"}, {"mix.merge": "dare", "mix.density": 0.5}]  # fmt: skip
