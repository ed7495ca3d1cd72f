"""Orthogonal LoRA: an adapter whose A matrices keep out of the row spaces of other bricks' A matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.adapters.entries import Stored
from workbench.adapters.read import CONFIG, Adapter
from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.weights.digests import tensor_digest

_PEFT = "base_model.model."
_NAME = "default"


class Orthogonal:
    """The A matrices of other bricks beside those that are trained (Wang et al. 2023, O-LoRA, arXiv 2310.14152, eq. 8).

    Args:
        bricks: Name -> directory of a LoRA adapter.
        model: The PEFT model in training; modules are matched by name.
        device: Where it is.

    Errors: a brick that is no LoRA, that shares no module, whose modules have another width. Each names the brick.
    """

    def __init__(self, bricks: Mapping[str, Path], model: Any, device: torch.device) -> None:
        mine = {
            name.removeprefix(_PEFT): module for name, module in model.named_modules() if _NAME in getattr(module, "lora_A", {})
        }
        self._pairs = {name: _shared(name, path, mine, device) for name, path in bricks.items()}

    def penalty(self) -> Tensor:
        """Σ over bricks i and modules of ‖A_i Aᵀ‖²_F, a scalar with a gradient."""
        squares = [(theirs @ _a(module).T).square().sum() for pairs in self._pairs.values() for theirs, module in pairs]
        return torch.stack(squares).sum()

    @torch.no_grad()
    def overlap(self) -> dict[str, float]:
        """Brick -> mean over shared modules of ‖A_i Aᵀ‖_F / (‖A_i‖_F ‖A‖_F): 0 for orthogonal row spaces, at most 1."""
        found = {}
        for name, pairs in self._pairs.items():
            parts = [
                float((theirs @ _a(module).T).norm() / (theirs.norm() * _a(module).norm()).clamp_min(1e-30))
                for theirs, module in pairs
            ]
            found[name] = math.fsum(parts) / len(parts)
        return found

    def digest(self) -> str:
        """Digest of the other bricks' matrices."""
        return json_digest([[name, [tensor_digest(theirs) for theirs, _ in pairs]] for name, pairs in self._pairs.items()])


def _a(module: Any) -> Tensor:
    """A of a PEFT layer, [rank, in], float32. Looked up each time: loading a save may replace the parameter."""
    weight: Tensor = module.lora_A[_NAME].weight
    return weight.float()


def _shared(name: str, path: Path, mine: Mapping[str, Any], device: torch.device) -> list[tuple[Tensor, Any]]:
    """(A of the brick, our layer) for each module that both adapt."""
    label = f"orthogonal_to: brick '{name}'"
    if not (path / CONFIG).is_file():
        raise WorkbenchError(f"{label}: expected a LoRA adapter, found no {CONFIG}", "Name bricks that hold a LoRA adapter.", 2)
    adapter = Adapter(path, label)
    if adapter.config["peft_type"] != "LORA":
        raise WorkbenchError(
            f"{label}: expected a LoRA adapter, found {adapter.config['peft_type']}", "Name bricks that hold a LoRA adapter.", 2
        )
    theirs = adapter.modules()
    shared = [module for module in theirs if module in mine]
    if not shared:
        raise WorkbenchError(
            f"{label} adapts none of the modules that are trained: it has {', '.join(sorted(theirs)[:3]) or 'no A matrices'}, "
            f"here {', '.join(sorted(mine)[:3])}",
            "Set `target_modules:` to what the bricks share, or leave the brick out.",
            2,
        )
    pairs = []
    for module in shared:
        entry = theirs[module][0]
        width = _a(mine[module]).shape[1]
        if entry.spec.shape[1:] != (width,):
            raise WorkbenchError(
                f"{label}: A of {module} is {list(entry.spec.shape)}, expected [rank, {width}]",
                "It was trained on another base: leave it out.",
                2,
            )
        pairs.append((Stored(entry, module, label).read(device), mine[module]))
    return pairs
