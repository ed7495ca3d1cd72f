"""Places of neurons and experts in tensors on disk, against what the live model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds import dense, mixtures
from worlds.neuron_sets import random_set
from worlds.project import CPU
from worlds.tiny import VOCABULARY

from workbench.activations.sets import NeuronAxis, neuron_axes, set_masks, unit_counts
from workbench.activations.sites import find_sites, scaling
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.masks import ScaledWeights
from workbench.weights.specs import TensorSpec

QUICK = ("llama", "gpt2", "opt", "phi3", "bloom")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in dense.configs()]
MIXTURES = [
    pytest.param(n, marks=() if n in ("mixtral", "granitemoe") else pytest.mark.nightly)
    for n in ("mixtral", "granitemoe", "qwen2_moe", "olmoe", "deepseek_v3")
]


def opened(path: Path) -> Model:
    checkpoint = Checkpoint(path, "base")
    return Model(checkpoint, checkpoint.config)


def logits(model: Model, tensors: dict[str, Tensor], path: Path) -> Tensor:
    live = live_model(model.config, tensors, path, CPU)
    return run(live)


@torch.no_grad()
def run(live: Any) -> Tensor:
    tokens = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    result: Tensor = live(input_ids=tokens, use_cache=False).logits
    return result


def permuted(tensor: Tensor, axis: NeuronAxis, order: Tensor) -> Tensor:
    """The tensor with the neurons of its layer in another order, in every stacked part."""
    spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
    rows = tensor.reshape(spec.rows, spec.cols)
    length = spec.rows if axis.axis == "rows" else spec.cols
    place = torch.arange(length)
    index = place // axis.units * axis.units + order[place % axis.units]
    return (rows[index] if axis.axis == "rows" else rows[:, index]).reshape(tensor.shape).contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_in_another_order_compute_the_same(family: str, dense_of: Callable[[str], Path]) -> None:
    """It holds only if every tensor that a neuron has a part in is found, with the right axis: matrices, biases, stacked halves."""
    path = dense_of(family)
    model = opened(path)
    tensors = compute(model, torch.float32, CPU)
    axes = neuron_axes(model)
    generator = torch.Generator().manual_seed(1)
    orders = {layer: torch.randperm(count, generator=generator) for layer, count in unit_counts(axes).items()}
    moved = {n: permuted(t, axes[n], orders[axes[n].layer]) if n in axes else t for n, t in tensors.items()}
    assert sorted(orders) == list(range(dense.LAYERS))
    assert any(not torch.equal(moved[n], tensors[n]) for n in axes)
    torch.testing.assert_close(logits(model, moved, path), logits(model, tensors, path), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_columns_are_neurons_that_are_off(family: str, dense_of: Callable[[str], Path]) -> None:
    check_off(dense_of(family))


@pytest.mark.parametrize("family", MIXTURES)
def test_zero_matrices_are_experts_that_are_off(family: str, tmp_path: Path) -> None:
    check_off(mixtures.save_mixture(family, tmp_path / family))


def check_off(path: Path) -> None:
    """Scaling a set's output by 0 in the weights equals switching it off in the live model."""
    model = opened(path)
    chosen = random_set(path, 0.3)
    masks = set_masks(chosen, model, "set", chosen.base, only_out=True)
    scaled = Model(ScaledWeights(model.weights, masks, 0.0), model.config)
    tensors = compute(model, torch.float32, CPU)
    live = live_model(model.config, tensors, path, CPU)
    sites = find_sites(live, model.layout.depth, CPU)
    assert {site.layer: site.units for site in sites} == dict(chosen.units)
    before = run(live)
    with scaling(live, sites, chosen.indices):
        off = run(live)
    assert not torch.allclose(before, off, atol=1e-3)
    torch.testing.assert_close(logits(model, compute(scaled, torch.float32, CPU), path), off, atol=2e-5, rtol=1e-4)


def test_masks_of_a_llama(llama: Path) -> None:
    """Rows of gate and up, columns of down, and nothing else; a layer without neurons of the set has empty masks."""
    model = opened(llama)
    chosen = random_set(llama, 0.25, layers=(1,))
    masks = set_masks(chosen, model, "set")
    assert {name.split(".")[-2] for name in masks} == {"gate_proj", "up_proj", "down_proj"}
    for name, mask in masks.items():
        expected = chosen.indices.get(int(name.split(".")[2]), torch.zeros(0, dtype=torch.long))
        assert torch.equal(mask.chosen.nonzero().flatten(), expected), name
        assert mask.axis == ("columns" if "down_proj" in name else "rows")
        assert mask.empty == ("layers.1." not in name)


def test_whole_experts_but_not_the_router(tmp_path: Path) -> None:
    """The mask holds the tensors of the chosen experts alone; router and shared expert belong to no expert."""
    path = mixtures.save_mixture("qwen2_moe", tmp_path / "moe")
    model = opened(path)
    chosen = random_set(path, 0.34)
    masks = set_masks(chosen, model, "set")
    assert all(".experts." in name for name in masks)
    assert not any("shared_expert" in name or name.endswith("mlp.gate.weight") for name in masks)
    rows = {
        name: mask.chosen.reshape(mixtures.EXPERTS, -1)
        for name, mask in masks.items()
        if ".experts.0." not in name and len(model.weights.specs[name].shape) == 3
    }
    for name, mask in rows.items():
        layer = model.layout.layer(name)
        assert torch.equal(mask.all(1), torch.isin(torch.arange(mixtures.EXPERTS), chosen.indices[layer or 0])), name
        assert torch.equal(mask.any(1), mask.all(1))
    single = {name: mask for name, mask in masks.items() if name not in rows}
    for name, mask in single.items():
        expert = int(name.split(".experts.")[1].split(".")[0])
        assert bool(mask.chosen.all()) == (expert in chosen.indices[model.layout.layer(name) or 0].tolist())
        assert mask.empty == (not mask.chosen.all())


def test_a_set_of_another_model_is_refused(llama: Path, dense_of: Callable[[str], Path]) -> None:
    other = random_set(dense_of("gpt2"))
    with pytest.raises(WorkbenchError, match="chosen on a model with 128 neurons in layer 0, this model has 48 neurons"):
        set_masks(other, opened(llama), "where.neurons: sets/math")
    mine = random_set(llama, base="0" * 32)
    with pytest.raises(WorkbenchError, match="chosen on a model with other weights"):
        set_masks(mine, opened(llama), "set", "1" * 32)
