"""`workbench.Neurons` on live models: scaled activations are scaled weights, and nothing scaled is the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from worlds.jsonl import write_jsonl
from worlds.mixtures import save_mixture
from worlds.project import Project
from worlds.tiny import live

import workbench
from workbench import Neurons, WorkbenchError
from workbench.activations.sets import set_of, write_set

TOKENS = torch.tensor([[3, 7, 9, 4, 12]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return live(llama)


@pytest.mark.parametrize("factor", [0.0, 2.0, -0.5])
def test_scaled_neurons_are_scaled_columns(model: PreTrainedModel, llama: Path, factor: float) -> None:
    chosen = {0: [1, 5], 1: [0]}
    with Neurons(model).scaled(chosen, factor):
        found = logits(model)
    other = live(llama)
    for layer, index in chosen.items():
        with torch.no_grad():
            other.model.layers[layer].mlp.down_proj.weight[:, index] *= factor
    assert not torch.equal(found, logits(model))
    torch.testing.assert_close(found, logits(other), atol=1e-5, rtol=0)


def test_nothing_scaled_is_the_same_bits(model: PreTrainedModel) -> None:
    neurons, before = Neurons(model), logits(model)
    for chosen, factor in (({}, 0.0), ({0: []}, 0.0), ({0: [1, 2]}, 1.0)):
        with neurons.scaled(chosen, factor):
            assert torch.equal(logits(model), before)
    with neurons.scaled({0: [1]}):
        pass
    assert torch.equal(logits(model), before)


def test_blocks_compose(model: PreTrainedModel) -> None:
    """Twice a half is a quarter, and an error inside a block ends it."""
    neurons, before = Neurons(model), logits(model)
    with neurons.scaled({1: [4]}, 0.5), neurons.scaled({1: [4]}, 0.5):
        twice = logits(model)
    with neurons.scaled({1: [4]}, 0.25):
        torch.testing.assert_close(twice, logits(model), atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match="stop"), neurons.scaled({1: [4]}):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)


def test_activations_are_recorded_as_scaled(model: PreTrainedModel) -> None:
    neurons = Neurons(model)
    with neurons.recorded({0: [2, 0]}) as plain:
        logits(model)
        logits(model)
    assert [tuple(t.shape) for t in plain[0]] == [(1, 5, 2)] * 2
    with neurons.scaled({0: [2]}, 3.0), neurons.recorded({0: [2, 0]}) as seen:
        logits(model)
    torch.testing.assert_close(seen[0][0], plain[0][0] * torch.tensor([3.0, 1.0]))


def test_a_set_and_a_recipe_s_weights(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set's folder works as its indices do, also while `swap` holds other weights."""
    monkeypatch.chdir(project.path)
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic, bricks: {one: 3.0}}]\n", "mix.yaml")
    base, mixed = workbench.load("base"), workbench.load_recipe("mix")
    neurons = Neurons(base)
    none = torch.tensor([], dtype=torch.long)
    write_set(Path("set"), set_of("s", neurons.sites, [torch.tensor([1, 3]), *[none] * (len(neurons.sites) - 1)]))
    plain = logits(base)
    with mixed.swap(base), neurons.scaled("set"):
        found = logits(base)
    assert torch.equal(logits(base), plain)
    other = mixed.model("cpu")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[:, [1, 3]] = 0
    torch.testing.assert_close(found.float(), logits(other).float(), atol=1e-5, rtol=0)


def test_a_memory_answers_beside_scaled_neurons(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path)
    write_jsonl(project.path / "facts.jsonl", [{"prompt": "{subject} is", "subject": "w3", "target": "w4"}])
    project.write("bricks: {}\nsteps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n", "remembers.yaml")
    model = workbench.load_recipe("remembers").model("cpu")
    neurons = Neurons(model)
    before = logits(model)
    with neurons.scaled({0: list(range(8))}):
        changed = logits(model)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model), before)


def test_experts_are_scaled(tmp_path: Path) -> None:
    save_mixture("mixtral", tmp_path / "m")
    model = live(tmp_path / "m")
    neurons, before = Neurons(model), logits(model)
    layer, count = next(iter(neurons.units.items()))
    with neurons.scaled({layer: list(range(count))}, 1.0):
        assert torch.equal(logits(model), before)
    with neurons.scaled({layer: list(range(count))}):
        assert not torch.equal(logits(model), before)


def test_unknown_neurons_are_named(model: PreTrainedModel) -> None:
    neurons = Neurons(model)
    for chosen, message in (({0: [99999]}, "no neuron 0.99999: layer 0 has"), ({9: [1]}, "no neuron 9.1: only layers")):
        with pytest.raises(WorkbenchError, match=message), neurons.scaled(chosen):
            pass
