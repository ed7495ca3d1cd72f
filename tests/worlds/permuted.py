"""Copies of a tiny llama with its units in another order and with other signs, which compute the same function."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from worlds.tiny import LAYERS, tensors_of


@dataclass(frozen=True)
class Order:
    """Unit i of the copy is unit order[i] of the original, times sign[i]."""

    order: torch.Tensor
    sign: torch.Tensor

    @classmethod
    def drawn(cls, units: int, seed: int) -> Order:
        generator = torch.Generator().manual_seed(seed)
        sign = torch.randint(0, 2, (units,), generator=generator) * 2.0 - 1
        return cls(torch.randperm(units, generator=generator), sign)

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[self.order] * self.sign[:, None]

    def columns(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[:, self.order] * self.sign

    def matrix(self) -> torch.Tensor:
        return self.rows(torch.eye(len(self.order)))


@dataclass(frozen=True)
class Planted:
    """The orders of a copy: of the residual stream, and of each layer's neurons (`up_proj` carries the sign)."""

    hidden: Order
    neurons: tuple[Order, ...]


def save_permuted(base: Path, out: Path, *, noise: float = 0.0) -> Planted:
    """A copy of a tied llama (32 wide, 48 neurons) with units in another order, plus noise relative to each tensor's deviation."""
    from safetensors.torch import save_file

    shutil.copytree(base, out)
    planted = Planted(Order.drawn(32, 1), tuple(Order.drawn(48, 2 + layer) for layer in range(LAYERS)))
    generator, changed = torch.Generator().manual_seed(99), {}
    for name, tensor in tensors_of(base).items():
        part = name.split(".")[-2]
        neurons = planted.neurons[int(name.split(".")[2])] if ".layers." in name else None
        if part in ("q_proj", "k_proj", "v_proj", "embed_tokens"):
            new = planted.hidden.columns(tensor)
        elif part == "o_proj":
            new = planted.hidden.rows(tensor)
        elif part == "gate_proj":
            new = planted.hidden.columns(tensor)[neurons.order]
        elif part == "up_proj":
            new = neurons.rows(planted.hidden.columns(tensor))
        elif part == "down_proj":
            new = planted.hidden.rows(neurons.columns(tensor))
        else:
            new = tensor[planted.hidden.order]
        changed[name] = (new + noise * new.std() * torch.randn(new.shape, generator=generator)).contiguous()
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    return planted
