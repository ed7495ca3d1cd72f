"""Routing among merges: bricks that are recipes with an adapter as their result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import CPU, Project
from worlds.routed_models import domain_prompts, ids, write_calibration
from worlds.tiny import tensors_of

import workbench
from workbench.ground.errors import WorkbenchError
from workbench.route.text import Text
from workbench.run.forms import form_of
from workbench.run.materialize import configuration_digest, materialize
from workbench.run.plan import plan

PAIR = "name: pair\nbricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\n"
ADAPTER = "output: {form: adapter}\n"
ROUTED = """
bricks: {both: {recipe: recipes/pair.yaml}, three: bricks/three}
steps:
  - route: text
    samples: 16
    bricks:
      both: {calibration: [calibration/one.jsonl, calibration/two.jsonl]}
      three: {calibration: calibration/three.jsonl}
"""


@pytest.fixture
def merges(project: Project) -> Project:
    """The project with calibration prompts, and a recipe that merges two bricks into an adapter."""
    write_calibration(project.path)
    project.write(PAIR + ADAPTER, "pair.yaml")
    return project


def prompts() -> dict[str, str]:
    """Domain -> a prompt of it that is no calibration prompt."""
    return {name: domain_prompts(name, 1, start=30)[0] for name in ("one", "two", "three")}


def logits(model: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids(text)).logits
    return found


def test_a_merge_answers_as_its_checkpoint_does(merges: Project) -> None:
    """Prompts of both skills go to the merge, whose logits are those of the same merge as a checkpoint in float32."""
    text = ROUTED + "output: {dtype: float32}\n"
    planned = plan(merges.resolve(text), merges.path / "runs")
    assert planned.steps[0].bricks == {"both": "recipe", "three": "adapter"}
    assert planned.steps[0].cost == {"prompts": 32 - 4}, "eight of each of two files, and twelve of the third"
    document = merges.run(text)
    model = workbench.load(document["directory"], device="cpu")
    merged = workbench.load(merges.run(PAIR + "output: {dtype: float32}\n", "dense.yaml")["model"], device="cpu")
    chosen = {name: model.routing.label(model.routing.decide([ids(t)[0].tolist()]).weights[0]) for name, t in prompts().items()}
    assert chosen == {"one": "both", "two": "both", "three": "three"}
    for name in ("one", "two"):
        torch.testing.assert_close(logits(model, prompts()[name]), logits(merged, prompts()[name]), rtol=0, atol=1e-5)
    with model.routing.fixed(None):
        assert not torch.allclose(logits(model, prompts()["one"]), logits(merged, prompts()["one"]), atol=1e-3)


def test_the_adapter_is_that_of_the_recipe(merges: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed once, equals the one that `run` writes, and its digest and its calibration stand in routing.json."""
    document = merges.run(ROUTED)
    place = Path(document["directory"])
    alone = merges.run(PAIR + ADAPTER, "pair.yaml")
    mine, theirs = tensors_of(place / "adapters" / "both"), tensors_of(Path(alone["adapter"]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    record = json.loads((place / "routing.json").read_text())
    both, three = record["bricks"]
    assert both["ranks"] == [12], "the ranks of the two bricks are 8 and 4"
    assert three["ranks"] == [4]
    assert record["solved_on"] == record["base"] == document["steps"][0]["solved_on"], "the base as it is"
    resolved, output = merges.resolve(ROUTED), json.loads((place.parent / "run.json").read_text())["output"]
    assert 0 <= output["bytes"] - form_of(resolved).size(resolved) < 5000, "the head of a file"
    assert record["calibration"][0]["files"] == ["calibration/one.jsonl", "calibration/two.jsonl"]
    assert len(record["calibration"][0]["prompts"]) == 16
    assert configuration_digest(merges.resolve(ROUTED), CPU)[0] == document["configuration"]
    import workbench.run.compose as composing

    monkeypatch.setattr(composing, "written_adapter", lambda *_: pytest.fail("the adapter is computed again"))
    materialize(merges.resolve(ROUTED.replace("samples: 16", "samples: 8")), CPU)


def test_the_merge_is_part_of_the_key(merges: Project) -> None:
    key = merges.resolve(ROUTED).key
    merges.write(PAIR.replace("0.5", "0.6") + ADAPTER, "pair.yaml")
    assert merges.resolve(ROUTED).key != key


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (PAIR, "brick 'both' is a recipe whose result is a checkpoint, but step 'route-text' needs an adapter of the base"),
        (
            "name: pair\nbricks: {full: bricks/full}\nsteps: [{merge: linear}]\noutput: {form: adapter, rank: 4, accept_error: 0.9}\n",
            "the result of recipe pair has a whole tensor for model",
        ),
    ],
)
def test_merges_that_cannot_act_beside_the_weights(
    inner: str, message: str, merges: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before a router is fitted."""
    monkeypatch.setattr(Text, "fit", lambda *_: pytest.fail("the router is fitted"))
    merges.write(inner, "pair.yaml")
    with pytest.raises(WorkbenchError) as caught:
        merges.run(ROUTED)
    assert message in caught.value.message
    assert not list(merges.path.glob(".workbench/adapters/*"))


def test_an_empty_list_of_files_is_refused(merges: Project) -> None:
    with pytest.raises(WorkbenchError, match="calibration"):
        merges.resolve(ROUTED.replace("[calibration/one.jsonl, calibration/two.jsonl]", "[]"))
