"""Sets of neurons as bricks: their card and axes, `brick ls|show|verify`, and where a recipe refuses them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from worlds.commands import call, document, refused
from worlds.neuron_sets import random_set
from worlds.project import Project
from worlds.tiny import edit_json

from workbench.bricks.card import Axes, BaseRecord, axes_of, read_card
from workbench.bricks.neuron_sets import neuron_brick, write_neuron_brick
from workbench.ground.errors import WorkbenchError


@pytest.fixture
def place(project: Project, cwd: Path) -> Path:
    """bricks/math, a quarter of the neurons of the tiny llama, beside the adapter bricks/one."""
    shared = (project.path / "bricks").resolve()
    (project.path / "bricks").unlink()
    shutil.copytree(shared / "one", project.path / "bricks" / "one")
    neurons = random_set(project.path / "base", evidence={"method": "average_precision", "share": 0.25})
    write_neuron_brick(project.path / "bricks" / "math", neurons, BaseRecord(id="base"), licence="Apache-2.0")
    return project.path / "bricks" / "math"


def test_round_trip_ls_and_show(place: Path) -> None:
    neurons, card = neuron_brick(place)
    assert card is not None
    assert (card.kind, card.functions, card.digest) == ("neurons", ("math",), neurons.digest())
    assert card.base.digest == neurons.base
    assert card.skill == "48 neurons for math (25 %)"
    assert (place / "brick.yaml").read_text().startswith("# Written by `workbench analyze`. See neurons.json for how")
    (row,) = document("brick", "ls")
    assert (row["name"], row["kind"], row["axes"]["origin"]) == ("math", "neurons", "emergent")
    assert "48 neurons for math" in call("brick", "ls").output
    shown = document("brick", "show", "math")
    assert shown["axes"] == {
        "origin": "emergent",
        "granularity": "neuron",
        "computation": "neuron_mask",
        "routing": "none",
        "aggregation": "none",
        "training": "none",
    }
    assert shown["neurons"]["size"] == 48
    assert shown["neurons"]["layers"]["0"]["size"] == 12
    assert shown["neurons"]["layers"]["0"]["best"][0]["score"] == 1.0
    text = call("brick", "show", "math").output
    assert "48 of 192 neurons (25 %) in 4 of 4 layers" in text
    assert "average_precision" in text
    assert "emergent, neuron, neuron mask, routing: none" in text
    assert "0.25" in text


def test_sets_overlap_are_verified_and_are_no_bricks_to_merge(place: Path, project: Project) -> None:
    other = random_set(project.path / "base", seed=1)
    write_neuron_brick(place.parent / "code", other, BaseRecord(id="base"))
    neurons, _ = neuron_brick(place)
    assert document("brick", "show", "math", "code")["overlap"] == {"code": neurons.overlap(other)}
    assert "is no set of neurons" in refused("brick", "show", "math", "one").message
    assert "measures a delta" in refused("brick", "show", "math", "--metric", "norm").message
    assert "48 neurons with parts of 12 tensors fit base" in call("brick", "verify", "math").output
    edit_json(place / "neurons.json", base="0" * 32)
    assert "other weights" in refused("brick", "verify", "math").message
    edit_json(place / "neurons.json", base=None)
    assert "only their numbers were compared" in call("brick", "verify", "math").output
    card = (place / "brick.yaml").read_text()
    digest = read_card(place).digest or ""
    (place / "brick.yaml").write_text(card.replace(digest, "a1" * 16))
    assert "but its card says" in refused("brick", "verify", "math").message
    with pytest.raises(WorkbenchError, match="brick 'math': bricks/math is a set of neurons of the base") as caught:
        project.resolve("bricks: {math: bricks/math}\nsteps: [{merge: average}]\n")
    assert "where: {neurons: bricks/math}" in (caught.value.hint or "")
    assert "edit: scale_neurons" in (caught.value.hint or "")
    project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average, where: {neurons: bricks/math}}]\n")


def test_axes_of_an_adapter_follow_from_kind_and_files(place: Path, project: Project) -> None:
    shown = document("brick", "show", "one", "--card")
    assert shown["axes"] == {
        "origin": "customized",
        "granularity": "layer",
        "computation": "low_rank_update",
        "routing": "none",
        "aggregation": "parameter_sum",
        "training": "post_hoc",
    }
    assert "customized, layer, low rank update, routing: none" in call("brick", "show", "one", "--card").output
    assert axes_of("adapter", Axes(), {"orthogonal_to": ["bricks/one"]})["training"] == "continual"
    assert axes_of("adapter", Axes(), tuner="LOKR")["computation"] == "structured_update"
    assert axes_of("checkpoint", Axes())["granularity"] == "model"
    assert axes_of("neurons", Axes(), experts=True)["granularity"] == "group"
    assert axes_of("adapter", Axes(training="joint"))["training"] == "joint"


CARD = "version: 1\nname: one\nkind: adapter\nbase: {{id: base}}\naxes:\n  {}\n"


def test_contradictions_name_the_field(place: Path, project: Project) -> None:
    """A card that contradicts its kind, and a recipe that contradicts a card."""
    card = place.parent / "one" / "brick.yaml"
    card.write_text(CARD.format("computation: memory"))
    with pytest.raises(
        WorkbenchError, match=r"brick.yaml:6:3 axes.computation: a brick of kind adapter has computation"
    ) as caught:
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
    assert "low_rank_update or structured_update, found memory" in caught.value.message
    card.write_text(CARD.format("origin: found"))
    with pytest.raises(WorkbenchError, match=r"brick.yaml:6:\d+ axes.origin"):
        read_card(card.parent)
    card.write_text(CARD.format("routing: token"))
    with pytest.raises(WorkbenchError, match=r"its card says axes.routing: token, but step 'merge-average' adds its delta"):
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
    project.resolve("bricks: {one: bricks/one}\nsteps: [{route: fixed}]\n")
    card.write_text(CARD.format("training: joint"))
    project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")


def test_model_cards_list_axes_and_sets(place: Path, project: Project) -> None:
    run = project.run("bricks: {one: bricks/one}\nsteps: [{merge: average, where: {neurons: bricks/math}}]\n")
    text = (Path(run["model"]) / "README.md").read_text("utf-8")
    assert "| neurons `bricks/math` | math |" in text
    assert "| `one` | customized | layer | low rank update | none | parameter sum | post hoc |" in text
    assert "| `bricks/math` | emergent | neuron | neuron mask | none | none | none |" in text
