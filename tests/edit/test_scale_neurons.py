"""`edit: scale_neurons`: a set of neurons switched off or amplified in the weights."""

from __future__ import annotations

import pytest
import torch

from worlds.neuron_sets import random_set, save_random_set
from worlds.project import CPU, Project
from worlds.tiny import tensors_of

from workbench.activations.sets import NeuronSet, write_set
from workbench.ground.errors import WorkbenchError
from workbench.run.plan import plan


@pytest.fixture
def chosen(project: Project) -> NeuronSet:
    """A quarter of the neurons of layers 1 and 3, in sets/math."""
    return save_random_set(project.path / "sets" / "math", project.path / "base", layers=(1, 3))


STEP = "{{edit: scale_neurons, neurons: sets/math, factor: {}}}"


@pytest.mark.parametrize("factor", [0, 1, 2, -0.5])
def test_columns_are_scaled_and_nothing_else(project: Project, chosen: NeuronSet, factor: float) -> None:
    scaled = project.tensors(f"steps: [{STEP.format(factor)}]\n")
    for name, theta in tensors_of(project.path / "base").items():
        expected = theta.float().clone()
        if "down_proj" in name and (index := chosen.indices.get(int(name.split(".")[2]))) is not None:
            expected[:, index] *= factor
        assert torch.equal(scaled[name], expected), name


def test_after_a_merge_the_current_columns_are_scaled(project: Project, chosen: NeuronSet) -> None:
    head = "bricks: {one: bricks/one}\n"
    merged = project.tensors(head + "steps: [{merge: average}]\n")
    both = project.tensors(head + f"steps: [{{merge: average}}, {STEP.format(0)}]\n")
    for layer, index in chosen.indices.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert not both[name][:, index].any()
        rest = torch.ones(both[name].shape[1], dtype=torch.bool)
        rest[index] = False
        assert torch.equal(both[name][:, rest], merged[name][:, rest])


@pytest.mark.parametrize("factor", [0, 2])
def test_an_adapter_holds_it(project: Project, chosen: NeuronSet, factor: float) -> None:
    """The rank of a layer is the number of its neurons in the set, and PEFT computes the same weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    text = f"steps: [{STEP.format(factor)}]\n"
    scaled = project.tensors(text)
    document = project.run(text + "output: {form: adapter, rank: exact}\n")
    plain = AutoModelForCausalLM.from_pretrained(project.path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, document["adapter"])
    assert adapted.peft_config["default"].r == 12
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        if name in scaled:
            torch.testing.assert_close(tensor, scaled[name], atol=1e-6, rtol=0)


def test_a_checkpoint_is_written_without_a_live_model(project: Project, chosen: NeuronSet) -> None:
    text = f"steps: [{STEP.format(0)}]\n"
    planned = plan(project.resolve(text), project.path / "runs")
    assert planned.steps[0].to_dict()["neurons"]["size"] == 24
    document = project.run(text)
    assert document["status"] == "done"
    written = tensors_of(project.path / "runs" / document["run"].split("/")[-1] / "model")
    for layer, index in chosen.indices.items():
        assert not written[f"model.layers.{layer}.mlp.down_proj.weight"][:, index].any()


def test_keys(project: Project, chosen: NeuronSet) -> None:
    first = project.resolve(f"steps: [{STEP.format(0)}]\n").keys[-1]
    assert project.resolve(f"steps: [{STEP.format(2)}]\n").keys[-1] != first
    save_random_set(project.path / "sets" / "math", project.path / "base", seed=9)
    assert project.resolve(f"steps: [{STEP.format(0)}]\n").keys[-1] != first


def test_refused(project: Project, chosen: NeuronSet) -> None:
    with pytest.raises(WorkbenchError, match=r"neurons: sets/none: no such directory"):
        project.resolve("steps: [{edit: scale_neurons, neurons: sets/none}]\n")
    with pytest.raises(WorkbenchError, match=r"step 'grow-depth' grows the model first") as caught:
        project.resolve(f"steps: [{{grow: depth, blocks: 1}}, {STEP.format(0)}]\n")
    assert "before 'grow-depth'" in (caught.value.hint or "")
    mine = random_set(project.path / "base")
    units = {**mine.units, 0: 96}
    write_set(project.path / "sets" / "math", NeuronSet("math", "neurons", units, mine.indices))
    with pytest.raises(WorkbenchError, match="chosen on a model with 96 neurons in layer 0, this model has 48 neurons"):
        project.resolve(f"steps: [{STEP.format(0)}]\n")


def test_ablated_neurons_are_those_that_a_live_model_switches_off(project: Project, chosen: NeuronSet) -> None:
    from workbench.activations.sites import find_sites, scaling
    from workbench.models.live import compute, live_model

    resolved = project.resolve("steps: []\n")
    live = live_model(resolved.base.config, compute(resolved.base, torch.float32, CPU), resolved.base_path, CPU)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    scaled = project.tensors(f"steps: [{STEP.format(0)}]\n")
    off = live_model(resolved.base.config, scaled, resolved.base_path, CPU)
    with torch.no_grad(), scaling(live, find_sites(live, 4, CPU), chosen.indices):
        expected = live(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(off(tokens).logits, expected, atol=1e-5, rtol=1e-5)
