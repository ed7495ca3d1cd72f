"""`recipe diff`: every field that differs with defaults filled in, and the inputs whose content differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, document, refused
from worlds.project import Project

from workbench.bricks.hub import HEADERS
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.upkeep.recipediff import recipe_difference

FIRST = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{id: mix, merge: ties}]\n"


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    project.write(FIRST, "first.yaml")
    return project


def fields(found: dict[str, Any]) -> dict[str, tuple[Any, Any, str | None]]:
    return {one["field"]: (one["first"], one["second"], one["only"]) for one in found["fields"]}


def test_defaults_are_filled_in_on_both_sides(world: Project) -> None:
    """A default that is written out is no difference; one that is overridden shows the default's value."""
    plain = load_recipe(world.path / "recipes" / "first.yaml")
    (step,) = plain.steps
    dumped = step.model_dump(by_alias=True)
    text = FIRST.replace("merge: ties", f"merge: ties, density: {dumped['density']}, lambda: 0.25") + "seed: 3\n"
    world.write(text, "second.yaml")
    found = document("recipe", "diff", "first", "second")
    assert fields(found) == {
        "name": ("first", "second", None),
        "seed": (0, 3, None),
        "mix.lambda": (dumped["lambda"], 0.25, None),
    }
    assert found["inputs"] == []
    assert found["same_result"] is False
    assert (found["first"], found["second"]) == ("recipes/first.yaml", "recipes/second.yaml")


def test_equal_recipes_differ_in_their_names_alone(world: Project) -> None:
    world.write(FIRST, "second.yaml")
    found = document("recipe", "diff", "first", "second")
    assert list(fields(found)) == ["name"]
    assert (found["inputs"], found["unread"], found["same_result"]) == ([], [], True)
    result = call("recipe", "diff", "first", "first")
    assert result.stdout == "no field differs\n"
    assert "both recipes make the same configuration" in result.stderr


def test_bricks_are_compared_by_content(world: Project) -> None:
    """A brick at another place with the same content, and one with another content, with the digests that the project uses."""
    shutil.copytree(world.path / "bricks" / "one", world.path / "copy")
    world.write(FIRST.replace("bricks/one", "copy").replace("two: bricks/two", "two: bricks/one"), "second.yaml")
    found = document("recipe", "diff", "first", "second")
    assert fields(found)["bricks.one"] == ("bricks/one", "copy", None)
    inputs = {one["name"]: one for one in found["inputs"]}
    assert list(inputs) == ["bricks.one", "bricks.two"]
    assert inputs["bricks.one"]["same_content"] is True
    assert inputs["bricks.two"]["same_content"] is False
    resolved = resolve(load_recipe(world.path / "recipes" / "first.yaml"), HEADERS)
    one, two = (resolved.bricks[name] for name in ("one", "two"))
    assert inputs["bricks.two"]["first_digest"] == two.digest(resolved.cache)
    assert inputs["bricks.two"]["second_digest"] == inputs["bricks.one"]["first_digest"] == one.digest(resolved.cache)


def test_steps_and_their_files_are_compared(world: Project) -> None:
    text = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: linear}, {id: mix, merge: ties}]\n"
    world.write(text, "two-steps.yaml")
    found = fields(document("recipe", "diff", "first", "two-steps"))
    assert found["steps"] == (["mix"], ["merge-linear", "mix"], None)
    assert found["merge-linear.merge"] == (None, "linear", "second")
    assert not any(name.startswith("mix.") for name in found)
    world.write(FIRST.replace("{id: mix, merge: ties}", "{merge: dare}"), "dare.yaml")
    other = fields(document("recipe", "diff", "first", "dare"))
    assert other["0.merge"] == ("ties", "dare", None)
    assert other["0.id"] == ("mix", None, None)
    for name, target in (("a", "w4"), ("b", "w5"), ("c", "w4")):
        (world.path / f"{name}.jsonl").write_text(
            json.dumps({"prompt": "{subject} is", "subject": "w3", "target": target}) + "\n"
        )
        world.write(f"bricks: {{}}\nsteps: [{{id: say, edit: memit, facts: {name}.jsonl}}]\n", f"{name}.yaml")
    (differs,) = document("recipe", "diff", "a", "b")["inputs"]
    assert (differs["name"], differs["first"], differs["second"], differs["same_content"]) == (
        "say, file 1",
        "a.jsonl",
        "b.jsonl",
        False,
    )
    (same,) = document("recipe", "diff", "a", "c")["inputs"]
    assert same["same_content"] is True


def test_what_cannot_be_read_is_said_and_fields_are_compared_all_the_same(world: Project) -> None:
    world.write(FIRST.replace("bricks/two", "bricks/gone"), "gone.yaml")
    found = document("recipe", "diff", "first", "gone")
    assert fields(found)["bricks.two"] == ("bricks/two", "bricks/gone", None)
    assert found["same_result"] is None
    (unread,) = found["unread"]
    assert unread["recipe"] == "second"
    assert "bricks/gone" in unread["reason"]
    assert {one["name"]: one["same_content"] for one in found["inputs"]} == {"bricks.two": None}  # the others have one location
    result = call("recipe", "diff", "first", "gone")
    assert "digests of the second recipe are not known: " in result.stderr
    assert "not known" in result.stdout


def test_bad_input_searches_and_printed_values(world: Project) -> None:
    world.write(FIRST.replace("merge: ties", "merge: ties, lambda: 0.25, density: 0.9"), "second.yaml")
    printed = call("recipe", "diff", "first", "second").stdout
    head, *lines = printed.splitlines()
    assert head.split() == ["field", "recipes/first.yaml", "recipes/second.yaml"]
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["mix.lambda"][1] == "0.25"
    assert cells["mix.density"][1] == "0.9"
    assert "Did you mean 'first'" in refused("recipe", "diff", "first", "frist").message
    world.write("steps: [{merge: tise}]\n", "bad.yaml")
    error = refused("recipe", "diff", "first", "bad")
    assert error.exit_code == 2
    assert "unknown merge method 'tise'" in error.message
    world.write(FIRST + "search: {space: {mix.lambda: [0.2, 1.6]}}\neval: [x]\n", "tuned.yaml")
    first, second = (load_recipe(world.path / "recipes" / f"{name}.yaml") for name in ("first", "tuned"))
    found = {one.field for one in recipe_difference(first, second, HEADERS, ("first", "second")).fields}
    assert "eval" in found
    assert any(name.startswith("search") for name in found)
