"""Sets of neurons of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.activations.sets import NeuronSet, neuron_axes, unit_counts, write_set
from workbench.bricks.brick import checkpoint_digest
from workbench.models.layout import Model
from workbench.weights.checkpoint import Checkpoint


def random_set(
    model: Path, share: float = 0.25, *, seed: int = 0, layers: tuple[int, ...] | None = None, **fields: Any
) -> NeuronSet:
    """A random set of the model's neurons or experts, the same share of each layer."""
    checkpoint = Checkpoint(model, "base")
    axes = neuron_axes(Model(checkpoint, checkpoint.config))
    units = unit_counts(axes)
    generator = torch.Generator().manual_seed(seed)
    indices = {
        layer: torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
        for layer, count in units.items()
        if layers is None or layer in layers
    }
    kind = "experts" if all(".experts." in name for name in axes) else "neurons"
    scores = {layer: torch.linspace(0, 1, len(index)) for layer, index in indices.items()}
    return NeuronSet("math", kind, units, indices, **{"scores": scores, "base": checkpoint_digest(checkpoint, None), **fields})


def save_random_set(folder: Path, model: Path, share: float = 0.25, **options: Any) -> NeuronSet:
    """Write a random set of a model's neurons, and return it."""
    neurons = random_set(model, share, **options)
    write_set(folder, neurons)
    return neurons


def inside(name: str, index: Tensor, shape: torch.Size) -> Tensor | None:
    """Return a mask of the elements of a llama's tensor that belong to neurons; None for tensors without neurons."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    if "gate_proj" in name or "up_proj" in name:
        chosen[index] = True
    elif "down_proj" in name:
        chosen[:, index] = True
    else:
        return None
    return chosen
