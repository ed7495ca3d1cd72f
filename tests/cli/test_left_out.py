"""One recipe that cannot be taken does not stop a command about several: it is named, skipped, and told by exit code and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from worlds.commands import call
from worlds.project import Project
from worlds.suites import clustered_suite

from workbench.cli.app import app
from workbench.evaluate.lineup import lineup
from workbench.ground.errors import LeftOut, WorkbenchError
from workbench.recipe.recipe import load_recipe

TWO = "bricks: {one: bricks/one, two: bricks/two}\n"
DRAFTS = {
    "not YAML": ("steps: [\n", "draft.yaml:"),
    "unknown field": ("stepz: []\n", "stepz"),
    "unknown method": ("steps: [{merge: tise}]\n", "tise"),
    "not UTF-8": ("", "not UTF-8"),
}


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    clustered_suite(project)
    project.write(TWO + "steps: [{merge: average}]\neval: [mini]\n", "mean.yaml")
    project.write(TWO + "steps: [{merge: linear, bricks: {one: 3, two: 1}}]\neval: [mini]\n", "tilt.yaml")
    return project


def ended(*args: str) -> tuple[Result, WorkbenchError | None]:
    """A command, and the error that it ends with after its output."""
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, (WorkbenchError, SystemExit)), result.exception
    return result, result.exception if isinstance(result.exception, WorkbenchError) else None


def draft(world: Project, kind: str) -> str:
    text, found = DRAFTS[kind]
    path = world.write(text, "draft.yaml")
    if kind == "not UTF-8":
        path.write_bytes(b"name: \xff\n")
    return found


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_broken_draft_does_not_stop_the_report(kind: str, world: Project, score_once: Callable[[Project, str], None]) -> None:
    score_once(world, "tilt")
    found = draft(world, kind)
    result, error = ended("report")
    assert error is not None
    assert (error.message, error.exit_code, error.hint) == ("left out: draft", 1, "workbench recipe check recipes/draft.yaml")
    assert re.search(rf"warning: left out: draft \(.*{re.escape(found)}", result.stderr)
    written = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [one["name"] for one in written["left_out"]] == ["draft"]
    assert found in written["left_out"][0]["reason"]
    assert any(w.startswith("Left out: draft: ") for w in written["warnings"])
    assert [c["name"] for c in written["configurations"] if c["role"] == "configuration"] == ["tilt"]
    page = Path("reports/report.html").read_text("utf-8")
    assert "Left out: draft" in page
    Path("recipes/draft.yaml").unlink()
    assert "left_out" not in json.loads((call("report"), Path("reports/report.json").read_text("utf-8"))[1])


def test_where_only_drafts_are_left_their_error_is_the_command_s(world: Project) -> None:
    for name in ("mean.yaml", "tilt.yaml"):
        (world.path / "recipes" / name).unlink()
    draft(world, "unknown field")
    for args in (("report",), ("compare", "draft")):
        _, error = ended(*args)
        assert error is not None
        assert "stepz" in error.message
        assert error.exit_code == 2
    assert not Path("reports").exists()


def test_one_unscored_recipe_does_not_stop_compare(world: Project, score_once: Callable[[Project, str], None]) -> None:
    """Rows are those without it; nothing scored is an error as before."""
    every = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
    _, error = ended("compare", *every)
    assert error is not None
    assert error.message.startswith("not scored yet on mini: ")
    score_once(world, "mean")
    alone = json.loads(ended("compare", "mean", "--json")[0].stdout)
    result, error = ended("compare", *every, "--json")
    told = json.loads(result.stdout)
    assert told["left_out"] == [{"name": "tilt", "reason": "not scored yet on mini"}]
    assert told["rows"] == alone["rows"]
    assert "warning: left out: tilt (not scored yet on mini)" in result.stderr
    assert error is not None or result.exit_code == 3
    if error is not None:
        assert (error.message, error.exit_code) == ("left out: tilt", 1)
        assert error.hint == f"workbench eval {' '.join(every)}"


def test_a_missing_brick_and_a_draft_do_not_stop_compare(world: Project, score_once: Callable[[Project, str], None]) -> None:
    score_once(world, "mean")
    draft(world, "not YAML")
    world.write("bricks: {gone: bricks/gone}\nsteps: [{merge: average}]\neval: [mini]\n", "gone.yaml")
    result, _ = ended("compare", "draft", "gone", "mean", "--json")
    assert [one["name"] for one in json.loads(result.stdout)["left_out"]] == ["draft", "gone"]
    assert "no such directory" in json.loads(result.stdout)["left_out"][1]["reason"]


def test_a_named_recipe_that_is_not_scored_is_left_out_of_the_report(
    world: Project, score_once: Callable[[Project, str], None]
) -> None:
    score_once(world, "mean")
    result, error = ended("report", "mean", "tilt")
    assert error is not None
    assert (error.message, error.hint) == ("left out: tilt", "workbench eval mean tilt")
    assert "warning: left out: tilt (not scored yet)" in result.stderr
    assert json.loads(Path("reports/report.json").read_text("utf-8"))["left_out"] == [
        {"name": "tilt", "reason": "not scored yet"}
    ]


def test_a_recipe_with_the_name_of_a_brick_is_scored(world: Project) -> None:
    """The recipe is what was asked for; the brick is not scored alone, and no row counts the recipe as that brick."""
    world.write(TWO + "steps: [{merge: linear, bricks: {one: 1, two: 3}}]\neval: [mini]\n", "one.yaml")
    result, error = ended("eval", "one", "tilt", "--json")
    assert error is not None
    assert (error.message, error.exit_code) == ("left out: one", 1)
    assert "Two configurations have this name. Rename one" in (error.hint or "")
    found: Any = json.loads(result.stdout)
    assert [c["name"] for c in found["configurations"]] == ["base", "two", "average", "one", "tilt"]
    assert [one["name"] for one in found["left_out"]] == ["one", "one"]
    reasons = {one["reason"] for one in found["left_out"]}
    assert reasons == {f"brick 'one' of {name} is not scored alone: another recipe has its name" for name in ("one", "tilt")}
    assert "warning: left out: one (brick 'one' of tilt is not scored alone" in ended("eval", "one", "tilt")[0].stderr
    entries = {
        e.name: e for e in lineup([load_recipe(world.path / "recipes" / f"{n}.yaml") for n in ("one", "tilt")], left_out=[])
    }
    assert {name: entries[name].parents for name in ("one", "tilt")} == {"one": ("two",), "tilt": ("two",)}
    ended("report", "one", "tilt")
    written = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert {c["name"]: c["parents"] for c in written["configurations"] if c["role"] == "configuration"} == {
        "one": ["two"],
        "tilt": ["two"],
    }


def test_two_bricks_of_one_name_are_told_apart(world: Project) -> None:
    """Two recipes call different bricks by one name: the second one's is not scored, and is not taken for the first one's."""
    world.write(
        "bricks: {one: bricks/two, two: bricks/full}\nsteps: [{merge: linear, bricks: {one: 3, two: 1}}]\neval: [mini]\n",
        "other.yaml",
    )
    left: list[LeftOut] = []
    recipes = [load_recipe(world.path / "recipes" / f"{n}.yaml") for n in ("mean", "other")]
    entries = {e.name: e for e in lineup(recipes, left_out=left)}
    assert entries["mean"].parents == ("one", "two")
    assert entries["other"].parents == ()
    assert [(one.name, one.reason) for one in left] == [
        ("one", "brick 'one' of other is not scored alone: another brick has its name"),
        ("two", "brick 'two' of other is not scored alone: another brick has its name"),
    ]
    averages = [name for name, e in entries.items() if e.role == "average"]
    assert averages == ["average", "average-one-two"], "each pair of bricks has its own mean"
    assert entries["average"].resolved.key != entries["average-one-two"].resolved.key


def test_a_recipe_with_the_name_of_the_average_is_scored(world: Project) -> None:
    world.write(TWO + "steps: [{merge: linear, bricks: {one: 1, two: 3}}]\neval: [mini]\n", "average.yaml")
    left: list[LeftOut] = []
    entries = lineup([load_recipe(world.path / "recipes" / "average.yaml")], left_out=left)
    assert [(e.name, e.role) for e in entries] == [
        ("base", "base"),
        ("one", "brick"),
        ("two", "brick"),
        ("average", "configuration"),
    ]
    reason = "the average of the bricks 'average' is not scored: another configuration has its name"
    assert [(one.name, one.reason) for one in left] == [("average", reason)]


def test_two_recipes_or_the_base_of_one_name_are_refused(world: Project) -> None:
    world.write(TWO + "name: mean\nsteps: [{merge: linear, bricks: {one: 1, two: 3}}]\neval: [mini]\n", "again.yaml")
    with pytest.raises(WorkbenchError, match="two different configurations are called 'mean'"):
        call("eval", "mean", "again")
    world.write(TWO + "steps: [{merge: average}]\neval: [mini]\n", "base.yaml")
    with pytest.raises(WorkbenchError, match="two different configurations are called 'base'"):
        call("eval", "recipes/base.yaml")
    assert not Path("runs").exists()
