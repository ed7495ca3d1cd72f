"""Checkpoints as the hub publishes them: a tiny model of transformers, and beside it the tensors that its class does not load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from worlds.places import PROJECT

PUBLISHED = PROJECT.parent / "shared" / "data" / "published" / "published.json"
"""Families as published, beside the checkout; tests that read them are skipped where the file is missing."""
LAYER_AFTER_THE_LAST = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight")
"""A decoder layer that predicts a further token has these beside the tensors of other layers (DeepSeek V3, GLM 4.5, HY V3)."""


def published() -> dict[str, Any]:
    """Return the families; empty without the file."""
    found: dict[str, Any] = json.loads(PUBLISHED.read_text("utf-8")) if PUBLISHED.is_file() else {}
    return found


def speculative(tensors: dict[str, torch.Tensor], layers: int, kind: str) -> dict[str, torch.Tensor]:
    """Return tensors of a head that predicts further tokens: under `mtp.`, or as a layer after the last one."""
    rng = torch.Generator().manual_seed(7)
    last = {name: t for name, t in tensors.items() if f".layers.{layers - 1}." in name}
    if kind == "mtp":
        made = {f"mtp.layers.0.{name.partition(f'.layers.{layers - 1}.')[2]}": t for name, t in last.items()}
        made["mtp.fc.weight"] = torch.empty(32, 64)
    else:
        made = {name.replace(f".layers.{layers - 1}.", f".layers.{layers}."): t for name, t in last.items()}
        stem = next(iter(made)).partition(f".layers.{layers}.")[0]
        made |= {
            f"{stem}.layers.{layers}.{name}": torch.empty(32, 64 if name.startswith("eh") else 1).squeeze()
            for name in LAYER_AFTER_THE_LAST
        }
    return {name: torch.randn(t.shape, generator=rng).to(t.dtype) for name, t in made.items()}


def add(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """Add tensors to a checkpoint in one file."""
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {name: t.contiguous() for name, t in extra.items()}, file, metadata={"format": "pt"})


def of_file(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def with_head(families: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (type, kind of head) of the families that publish a head for further tokens."""
    for name, about in families.items():
        only = " ".join(about["published_only"])
        if about.get("model_type") and about["published_only"] and ("mtp" in only or ".layers." in only):
            yield name, "mtp" if "mtp" in only else "layer"
