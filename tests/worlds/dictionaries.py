"""Sparse autoencoders as files in SAELens' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def save_dictionary(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], file: str = "sae_weights.safetensors"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def random_autoencoder(folder: Path, width: int, features: int = 24, layer: int = 1) -> Path:
    """An autoencoder of the residual stream behind a layer, with random weights."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
    config = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": features,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    return save_dictionary(folder, config, {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()})
