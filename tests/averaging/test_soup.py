"""`recipe soup`: the recipe that it writes chooses among a run's checkpoints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from worlds.commands import call, refused
from worlds.project import Project
from worlds.search_world import lay_out
from worlds.tiny import save_adapter, save_finetuned
from worlds.trainers import state

from workbench.recipe.recipe import load_recipe


@pytest.fixture
def run(project: Project, cwd: Path) -> Project:
    """A project with a run of three full checkpoints, one of adapters, and a suite."""
    for i, step in enumerate((50, 100, 1000)):
        state(save_finetuned(project.path / "base", project.path / f"out/full/checkpoint-{step}", seed=10 + i), step)
        state(save_adapter(project.path / "base", project.path / f"out/lora/checkpoint-{step}", seed=20 + i), step)
    return lay_out(project)


@pytest.mark.parametrize(("kind", "folder"), [("checkpoint", "full"), ("adapter", "lora")])
def test_the_recipe_is_a_greedy_search_over_the_run(run: Project, kind: str, folder: str) -> None:
    result = call("recipe", "soup", "soup", "--run", f"out/{folder}", "--suite", "words", "--base", "base")
    file = run.path / "recipes/soup.yaml"
    assert result.stdout == "recipes/soup.yaml\n"
    written = yaml.safe_load(file.read_text("utf-8"))
    assert written["bricks"] == {f"step-{step}": {kind: f"out/{folder}/checkpoint-{step}"} for step in (50, 100, 1000)}
    assert written["search"] == {
        "sampler": "greedy",
        "space": {f"mix.bricks.step-{step}": {"choices": [0.0, 1.0]} for step in (50, 100, 1000)},
    }
    found = json.loads(call("search", "soup", "--device", "cpu", "--json").stdout)
    tried = [{step for step, weight in row["values"].items() if weight} for row in found["trials"] if row["arm"] == "search"]
    assert sorted(map(sorted, tried[:3])) == [[f"mix.bricks.step-{step}"] for step in (100, 1000, 50)]
    assert (len(tried), len(tried[3])) == (5, 2)  # 2n - 1; the last has the third checkpoint with one or both of the others


def test_names_that_yaml_reads_as_something_else(run: Project) -> None:
    for name in ("yes", "null", "1_000", "0x1f"):
        call("recipe", "soup", name, "--run", "out/full", "--suite", "on", "--base", "base")
        assert load_recipe(run.path / f"recipes/{name}.yaml").fields.eval is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["taken"], "taken.yaml: already exists"),
        (["Bad Name"], "Bad Name: expected a name of a-z, 0-9 and . _ -"),
        (["../out"], "../out: expected a name"),
        (["soup", "--run", "out/none"], "no such directory: out/none"),
        (["soup", "--run", "bricks"], "bricks has no checkpoints of a training run"),
        (["soup", "--last", "4"], "last: 4, but 3 checkpoints are in the window; there are steps 50, 100, 1000"),
        (["soup", "--run", "out/one"], "--run out/one: a soup takes two checkpoints, and one is in the window"),
    ],
)
def test_bad_input_writes_nothing(run: Project, arguments: list[str], said: str) -> None:
    shutil.copytree(run.path / "out/full/checkpoint-50", run.path / "out/one/checkpoint-50")
    (run.path / "recipes/taken.yaml").write_text("mine", "utf-8")
    before = sorted(run.path.rglob("*.yaml"))
    given = [*arguments, *(() if "--run" in arguments else ("--run", "out/full"))]
    assert said in refused("recipe", "soup", *given, "--suite", "words", "--base", "base").message
    assert sorted(run.path.rglob("*.yaml")) == before
    assert (run.path / "recipes/taken.yaml").read_text("utf-8") == "mine"
