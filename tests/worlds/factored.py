"""Adapters around factors in memory, merge steps on them, and the papers' formulas of spectral merges in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from worlds.merging import InMemory, merge

from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod
from workbench.weights.lowrank import Factors, LowRankSource

METHODS = {cls.name: cls for cls in methods().values() if issubclass(cls, MergeMethod)}
CORE = [name for name, cls in METHODS.items() if "core" in cls.laws.spaces]
SPECTRAL = ["tsv", "iso_c"]
Pairs = dict[str, tuple[Tensor, Tensor]]


class Lora:
    """An adapter around factors: tensor name -> (left, right); a tensor is kept dense where `dense` says so."""

    def __init__(self, pairs: Pairs, dense: tuple[str, ...] = ()) -> None:
        self.pairs, self.dense = pairs, dense

    def touches(self, name: str) -> bool:
        return name in self.pairs

    def factors(self, name: str, _device: torch.device) -> Factors | None:
        return None if name in self.dense else Factors(*self.pairs[name])

    def open_model(self, _name: str, _device: torch.device) -> None:
        return None

    def open_delta(self, name: str, device: torch.device) -> Any:
        return _Product(LowRankSource(Factors(*self.pairs[name]), device))


class _Product:
    def __init__(self, source: LowRankSource) -> None:
        self.source = source

    def read_delta(self, start: int, stop: int, _base: Tensor, out: Tensor) -> None:
        self.source.read(start, stop, out)


def step_on(
    method: str, base: dict[str, Tensor], deltas: dict[str, Any], keys: dict[str, str] | None = None, /, **fields: Any
) -> MergedWeights:
    """A merge step on models in memory; a brick is a Lora or the deltas of a checkpoint."""
    step = METHODS[method].model_validate({"merge": method, **fields})
    model = Model(InMemory(base), {"num_hidden_layers": 2})
    return MergedWeights(model, model, step, StepBricks(deltas, keys or {}))


def delta(method: str, deltas: list[Tensor], name: str = "w", **fields: Any) -> Tensor:
    """The merged delta of checkpoints with these deltas from a base of zeros: no rounding but the method's."""
    base = {name: torch.zeros_like(deltas[0])}
    return merge(method, base, {f"b{i}": {name: d} for i, d in enumerate(deltas)}, **fields)[name]


def lora(rank: int, rows: int = 24, cols: int = 18, seed: int = 0, names: tuple[str, ...] = ("w",)) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    made = {n: (torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator)) for n in names}
    return Lora(made)


def product(brick: Lora, name: str = "w") -> np.ndarray:
    left, right = brick.pairs[name]
    return left.double().numpy() @ right.double().numpy()


def relative(found: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - expected) / np.linalg.norm(expected))


def adapters(ranks: tuple[int, ...], **places: Any) -> dict[str, Lora]:
    return {f"b{i}": lora(rank, seed=i, **places) for i, rank in enumerate(ranks)}


def flat_copy(bricks: dict[str, Lora], name: str = "w") -> list[Tensor]:
    """The adapters' deltas as checkpoints have them."""
    return [torch.from_numpy(product(b, name)).float() for b in bricks.values()]


def tsv_formula(deltas: list[np.ndarray]) -> np.ndarray:
    """Gargiulo et al. 2025, algorithm 1: rank-1/T parts side by side, U and V each replaced by their polar factor."""
    share = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    left = np.concatenate([u[:, :share] for u, _, _ in parts], 1)
    values = np.concatenate([s[:share] for _, s, _ in parts])
    right = np.concatenate([v[:share] for _, _, v in parts], 0)
    u1, _, v1 = np.linalg.svd(left, full_matrices=False)
    u2, _, v2 = np.linalg.svd(right, full_matrices=False)
    return (u1 @ v1) @ np.diag(values) @ (u2 @ v2)


def iso_formula(deltas: list[np.ndarray]) -> np.ndarray:
    """Marczak et al. 2025, algorithm 1: the mean singular value over all of them."""
    u, s, v = np.linalg.svd(sum(deltas), full_matrices=False)
    return u @ np.diag(np.full_like(s, s.mean())) @ v
