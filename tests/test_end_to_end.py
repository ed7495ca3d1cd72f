"""The main job on a tiny model, by the command line: plan, run, eval, compare, report, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worlds.commands import call, document
from worlds.project import Project
from worlds.suites import clustered_suite

from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError

RECIPE = """
bricks: {one: bricks/one, two: bricks/two}
steps:
  - {id: deeper, grow: depth, blocks: 1}
  - {id: mix, merge: ties, density: 0.5}
  - {id: facts, edit: finetune, facts: facts.jsonl, epochs: 2, min_efficacy: 0}
eval: [mini]
"""


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """A project with a suite of 60 items in 20 clusters and a recipe of all three verbs."""
    clustered_suite(project)
    (project.path / "facts.jsonl").write_text('{"prompt": "a b", "target": "c"}\n{"prompt": "c d", "target": "e"}\n')
    project.write(RECIPE, "all.yaml")
    project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\neval: [mini]\n", "mean.yaml")
    return project


def test_plan_and_run(world: Project) -> None:
    planned = document("plan", "recipes/all.yaml")
    assert [step["id"] for step in planned["steps"]] == ["deeper", "mix", "facts"]
    assert planned["problems"] == []
    assert planned["cached"] == []
    assert planned["key"] is None, "no weights are read for it"
    ran = document("run", "recipes/all.yaml")
    assert list(ran) == [
        "run",
        "key",
        "status",
        "model",
        "adapter",
        "directory",
        "configuration",
        "steps",
        "said",
        "warnings",
        "seconds",
        "peak_bytes",
    ]
    assert ran["status"] == "done"
    assert (Path(ran["model"]) / "model.safetensors").stat().st_size > planned["write_bytes"]
    check = ran["steps"][0]["check"]
    assert len(check.pop("at_first_without")) == 7, "what stands before the two projections that start at zero"
    assert check == {
        "max_logit_difference": 0.0,
        "same_generation": True,
        "gradient": {"now": 2, "after_one_step": 9},
        "kept": {"identical": 22, "with_additions": 0, "rescaled": 0, "new": 9, "changed_later": 16},
        "reloaded": True,
    }
    assert (Path(ran["run"]) / "edits" / "facts" / "adapter_model.safetensors").is_file()
    again = document("plan", "recipes/all.yaml")
    assert (again["cached"], again["key"]) == (["facts", "run"], ran["key"])
    assert document("runs", "ls")[0]["configuration"] == ran["configuration"]
    call("runs", "verify", Path(ran["run"]).name)
    assert "checkpoint" not in call("runs", "show", "all").stdout


def test_eval_compare_report(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = document("eval", "recipes/all.yaml", "recipes/mean.yaml")
    assert list(scored) == ["suite", "plan", "configurations", "warnings"]
    assert [c["name"] for c in scored["configurations"]] == ["base", "one", "two", "average", "all", "mean"]
    ran = document("run", "recipes/all.yaml")
    digest = {c["name"]: c["weights"] for c in scored["configurations"]}
    assert digest["all"] == ran["configuration"], "what is scored in memory is what is written"
    assert digest["average"] == digest["mean"]

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a second evaluation loads no model")

    monkeypatch.setattr("workbench.run.materialize.materialize", never)
    assert document("eval", "recipes/all.yaml", "recipes/mean.yaml") == scored

    compared = call("compare", "all", "--json", code=(0, 3))
    found = json.loads(compared.stdout)
    assert found["baseline"] == "base"
    names = [
        "configuration",
        "task",
        "metric",
        "diff",
        "low",
        "high",
        "low_adj",
        "high_adj",
        "p",
        "p_adj",
        "n",
        "clusters",
        "mde",
        "verdict",
    ]
    assert set(names) <= set(found["rows"][0])
    worse = [r for r in found["rows"] if r["configuration"] == "all" and r["verdict"] == "worse"]
    assert compared.exit_code == (3 if worse else 0)
    world.write("bricks: {gone: bricks/gone}\nsteps: [{merge: average}]\n", "broken.yaml")
    world.write("output: {dtype: float32}\n", "wide.yaml")
    said = call("report").stderr
    assert "left out: broken (brick 'gone': no such directory" in said
    assert "left out: wide (another base or output dtype than all)" in said
    page = Path("reports/report.html").read_text("utf-8")
    assert "all.yaml" in page
    assert json.loads(Path("reports/report.json").read_text("utf-8"))["baseline"] == "base"


def test_recipes_are_compared_with_each_other_where_the_base_is_not_scored(world: Project) -> None:
    world.write(
        "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: linear, bricks: {one: 3, two: 1}}]\neval: [mini]\n",
        "tilt.yaml",
    )
    document("eval", "recipes/mean.yaml", "recipes/tilt.yaml", "--no-controls")
    compared = json.loads(call("compare", "mean", "tilt", "--baseline", "mean", "--json", code=(0, 3)).stdout)
    assert compared["baseline"] == "mean"
    assert {row["configuration"] for row in compared["rows"]} == {"tilt"}
    call("report", "mean", "tilt", "--baseline", "mean")
    with pytest.raises(WorkbenchError, match="not scored yet on mini: base") as error:
        call("compare", "mean", "tilt", "mean")
    assert error.value.hint == "workbench eval mean tilt"


def test_edit_left_out_gives_the_file_without_it(world: Project) -> None:
    with_edit = document("run", "recipes/all.yaml")
    without = world.write(
        RECIPE.replace("  - {id: facts, edit: finetune, facts: facts.jsonl, epochs: 2, min_efficacy: 0}\n", ""), "less.yaml"
    )
    first = (Path(document("run", str(without))["model"]) / "model.safetensors").read_bytes()
    shutil.rmtree("runs")
    shutil.rmtree(".workbench")
    assert (Path(document("run", str(without))["model"]) / "model.safetensors").read_bytes() == first
    assert with_edit["configuration"] != document("run", str(without))["configuration"]


def test_chat_reads_a_pipe(world: Project) -> None:
    result = CliRunner().invoke(
        app, ["chat", "recipes/mean.yaml", "--plain", "--max-new-tokens", "3"], input="a b\n", catch_exceptions=False
    )
    assert result.exit_code == 0
    assert result.stdout.strip()
