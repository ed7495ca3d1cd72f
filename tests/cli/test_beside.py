"""`analyze functions --beside`: the sets of a merge beside those of its base and bricks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.bricks.neuron_sets import neuron_brick


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    texts = [
        {"prompt": " ".join(f"w{20 * f + (7 * t + 3 * i + k) % 20}" for k in range(6)), "function": name, "task": f"{name}{t}"}
        for f, name in enumerate(("low", "high"))
        for t in range(4)
        for i in range(3)
    ]
    write_jsonl(project.path / "texts.jsonl", texts)
    bricks = "bricks: {one: bricks/one, two: bricks/two}\n"
    project.write(f"{bricks}steps: [{{merge: task_arithmetic, bricks: {{one: 2.0, two: 3.0}}}}]\n", "mix.yaml")
    project.write("steps: []\n", "alone-base.yaml")
    for name in ("one", "two"):
        project.write(f"{bricks}steps: [{{merge: task_arithmetic, bricks: {{{name}: 1.0}}}}]\n", f"alone-{name}.yaml")
    return project


def chosen(folder: Path) -> set[tuple[int, int]]:
    """The neurons of a stored set, as (layer, index)."""
    return {(layer, int(i)) for layer, index in neuron_brick(folder)[0].indices.items() for i in index}


def test_sets_beside_those_of_recipes_written_by_hand(world: Project) -> None:
    """Overlaps and scores follow from the stored scores of four analyses that a user would run one by one."""
    found = document("analyze", "functions", "recipes/mix.yaml", "--data", "texts.jsonl", "-o", "found", "--beside")
    beside = found["beside"]
    assert [(m["name"], m["role"]) for m in beside["models"]] == [
        ("base", "base"),
        ("one", "brick"),
        ("two", "brick"),
        ("mix", "merge"),
    ]
    stored = {}
    for name in ("base", "one", "two"):
        args = ("analyze", "functions", f"recipes/alone-{name}.yaml", "--data", "texts.jsonl", "-o", f"of-{name}")
        assert document(*args)["digest"] == next(m["digest"] for m in beside["models"] if m["name"] == name)
        stored[name] = load_file(world.path / f"of-{name}" / "functions.safetensors")
    stored["mix"] = load_file(world.path / "found" / "functions.safetensors")

    folders = {"mix": "found", **{name: f"of-{name}" for name in ("base", "one", "two")}}

    def scores(model: str, number: int) -> dict[str, Any]:
        start = "ap.heldout."
        return {key.removeprefix(start): v[number] for key, v in stored[model].items() if key.startswith(start)}

    for number, row in enumerate(beside["functions"]):
        assert row["function"] == ("low", "high")[number]
        sets = {m: chosen(world.path / folder / "sets" / row["function"]) for m, folder in folders.items()}
        for entry in row["models"]:
            own = sets[entry["model"]]
            for key, other in (("in_merge", "mix"), ("in_base", "base")):
                assert entry[key] == pytest.approx(len(own & sets[other]) / len(own))
            for key, model in (("score", entry["model"]), ("score_in_merge", "mix")):
                held = scores(model, number)
                assert entry[key] == pytest.approx(np.mean([held[str(layer)][i] for layer, i in own]), rel=1e-5)
        assert row["models"][-1]["in_merge"] == 1
        assert row["models"][-1]["score"] == row["models"][-1]["score_in_merge"]
        assert row["models"][0]["in_base"] == 1
    assert json.loads((world.path / "found" / "beside.json").read_text("utf-8")) == beside
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert "What merging did to the functional sets" in page
    text = call("analyze", "functions", "recipes/mix.yaml", "--data", "texts.jsonl", "-o", "found", "--beside").stdout
    assert "are in the merge's set too" in text


def test_a_brick_alone_is_its_own_merge(world: Project) -> None:
    """A recipe of one brick with weight 1 keeps all of the brick's sets."""
    found = document("analyze", "functions", "recipes/alone-one.yaml", "--data", "texts.jsonl", "-o", "found", "--beside")
    assert [m["name"] for m in found["beside"]["models"]] == ["base", "one", "alone-one"]
    for row in found["beside"]["functions"]:
        assert row["models"][1]["in_merge"] == 1
        assert row["models"][1]["score"] == row["models"][2]["score"]


def test_recipes_without_parents_or_with_other_neurons(world: Project) -> None:
    args = ("--data", "texts.jsonl", "-o", "found", "--beside")
    assert "llama has no bricks, so there is nothing beside it" in refused("analyze", "functions", "base", *args).message
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: average}, {id: deep, grow: depth, blocks: 1}]\n", "grown.yaml")
    assert "step 'deep' of grown grows the model" in refused("analyze", "functions", "recipes/grown.yaml", *args).message
    assert not (world.path / "found").exists()
