"""Sweeps on the command line: what `eval`, `compare`, `report`, `plan`, `run` and `recipe check` make of them on a tiny project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import run
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out

SWEEP = "sweep: {mix.lambda: [0.5, 1.0], mix.merge: [ties, task_arithmetic]}\n"
NAMES = ["mine[lambda=0.5,ties]", "mine[lambda=0.5,task_arithmetic]", "mine[lambda=1,ties]", "mine[lambda=1,task_arithmetic]"]


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """Two bricks and a suite of two tasks."""
    return lay_out(project)


def documents(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("runs/scores/*/*.json")}


def swept(document: Any) -> list[str]:
    return [name for point in document["sweeps"][0]["points"] for name in point["configurations"]]


def test_a_sweep_from_its_scores_to_its_page(world: Project) -> None:
    """One recipe: four configurations are scored, those of a recipe with the same weights are not scored again."""
    world.write(RECIPE + SWEEP, "mine.yaml")
    scored = json.loads(run("eval", "mine", "--device", "cpu", "--limit", "8", "--json").stdout)
    assert [c["name"] for c in scored["configurations"] if c["name"].startswith("mine")] == NAMES
    before = documents(world.path)

    world.write(RECIPE, "alone.yaml")  # TIES at lambda 1.0, a point of the sweep
    again = json.loads(run("eval", "alone", "--device", "cpu", "--limit", "8", "--json").stdout)
    assert documents(world.path) == before
    digests = {c["name"]: c["digest"] for c in [*scored["configurations"], *again["configurations"]]}
    assert digests["alone"] == digests["mine[lambda=1,ties]"]

    compared = json.loads(run("compare", "mine", "--limit", "8", "--json", code=(0, 3)).stdout)
    assert swept(compared) == NAMES
    assert compared["recommendation"]["family"]["members"] == 7  # the base, two bricks and four points
    shown = run("compare", "mine", "--limit", "8", code=(0, 3)).stdout
    assert "sweep mine: mean over skills" in shown
    assert "sweep mine: retention: say" in shown
    pair = json.loads(run("compare", NAMES[0], NAMES[2], "--limit", "8", "--json", code=(0, 3)).stdout)
    assert (pair["baseline"], {row["configuration"] for row in pair["rows"]}, "sweeps" in pair) == (NAMES[0], {NAMES[2]}, False)

    run("report", "mine", "--limit", "8", "-o", "reports/sweep.html")
    page = (world.path / "reports" / "sweep.html").read_text("utf-8")
    assert page.count('<svg class="curves"') == 4
    document = json.loads((world.path / "reports" / "sweep.json").read_text("utf-8"))
    texts = {c["name"]: c["recipe_text"] for c in document["configurations"]}
    assert "merge: task_arithmetic" in texts[NAMES[1]]
    assert "sweep" not in texts[NAMES[1]]


def test_options_give_the_same_as_the_recipe(world: Project) -> None:
    world.write(RECIPE, "mine.yaml")
    options = ["--sweep", "mix.lambda=0.5,1.0", "--sweep", "mix.merge=ties,task_arithmetic"]
    assert [line.strip() for line in run("recipe", "check", "mine", *options).stdout.splitlines()[1:]] == NAMES
    plans = json.loads(run("plan", "mine", *options, "--json").stdout)
    assert [plan["recipe"] for plan in plans] == NAMES
    table = run("plan", "mine", *options).stdout
    assert all(name in table for name in NAMES)
    error = run("compare", "mine", *options, code=1).exception
    assert "not scored yet" in error.message
    assert "--sweep mix.lambda=0.5,1.0 --sweep mix.merge=ties,task_arithmetic" in error.hint


def test_points_are_named_where_recipes_are(world: Project) -> None:
    world.write(RECIPE + SWEEP, "mine.yaml")
    found = json.loads(run("recipe", "diff", NAMES[0], NAMES[2], "--json").stdout)
    assert (found["first"], found["second"]) == (
        f"recipes/{NAMES[0].replace('mine', 'mine.yaml')}",
        "recipes/mine.yaml[lambda=1,ties]",
    )
    assert {"mix.lambda": (0.5, 1.0)}.items() <= {f["field"]: (f["first"], f["second"]) for f in found["fields"]}.items()
    assert "no such point" in run("search", "mine[lambda=3,ties]", code=2).exception.message
    assert "has no `search`" in run("search", NAMES[0], code=2).exception.message
    world.write(RECIPE, "plain.yaml")
    assert json.loads(run("plan", "plain[lambda=1]", "--json").stdout)["recipe"] == "plain[lambda=1]"
    assert "No step has the field 'lamda'" in run("plan", "plain[lamda=1]", code=2).exception.message
    assert "'other[lambda=1]': expected a recipe" in run("plan", "other[lambda=1]", code=2).exception.message


def test_run_writes_a_point_and_refuses_the_sweep(world: Project) -> None:
    world.write(RECIPE + SWEEP, "mine.yaml")
    error = run("run", "mine", "--device", "cpu", code=2).exception
    assert "mine stands for several configurations" in error.message
    done = json.loads(run("run", NAMES[3], "--device", "cpu", "--threads", "1", "--json").stdout)
    assert Path(done["run"]).name.startswith("mine[lambda=1,task_arithmetic]-")
    written = (Path(done["run"]) / "recipe.yaml").read_text("utf-8")
    assert written.startswith("# mine.yaml with --set mix.lambda=1.0 --set mix.merge=task_arithmetic\n")
    again = json.loads(run("run", str(Path(done["run"]) / "recipe.yaml"), "--device", "cpu", "--json").stdout)
    assert again["key"] == done["key"]
    fixed = ["--set", "mix.lambda=1.0", "--set", "0.merge=task_arithmetic"]
    named = run("run", "mine", *fixed, "--device", "cpu", "--json")
    assert json.loads(named.stdout)["key"] == done["key"]  # the method has no density, as in the sweep, and this is said
    by_hand = json.loads(run("plan", "mine", "--set", "mix.lambda=1.0", "--set", "0.merge=ties", "--json").stdout)
    assert by_hand["recipe"] == "mine"
    assert "no such point" in run("run", "mine[lambda=2]", "--device", "cpu", code=2).exception.message


BAD: dict[str, tuple[list[str], str]] = {
    "field": (["eval", "mine", "--sweep", "mix.lamda=1,2"], "--sweep mix.lamda"),
    "large": (["eval", "mine", "--sweep", f"seed={','.join(map(str, range(99)))}"], "99 points"),
    "models alone": (["eval", "base", "--suite", "words", "--sweep", "mix.lambda=1,2"], "--sweep varies recipe fields"),
    "one value": (["report", "mine", "--sweep", "mix.lambda=1"], "expected at least two values"),
    "point with no such field": (["compare", "mine[lamda=1]"], "No step has the field 'lamda'. Did you mean 'lambda'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case: str, world: Project) -> None:
    world.write(RECIPE, "mine.yaml")
    arguments, message = BAD[case]
    error = run(*arguments, code=2).exception
    assert message in error.message
    assert not (world.path / "runs").exists()
