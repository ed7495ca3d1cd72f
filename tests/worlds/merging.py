"""Merges of models in memory, and a plain form of trimming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worlds.project import CPU

from workbench.merge.streaming.deltas import StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.merge.streaming.trim import keep_count
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod
from workbench.weights.specs import TensorSpec, load

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
TINY = {torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 2.0**-24}


class InMemory:
    """Weights around tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {n: TensorSpec.of(t.shape, t.dtype) for n, t in self.tensors.items()}

    def origin(self, name: str) -> str:
        return name

    def open(self, name: str, _device: torch.device) -> Any:
        return _Reader(self.tensors[name])


class _Reader:
    def __init__(self, tensor: Tensor) -> None:
        self.rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.rows[start:stop])


def merge(
    method: str | type[MergeMethod],
    base: dict[str, Tensor],
    tuned: dict[str, dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    measured: Any = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """The merge of models in memory, written in a dtype; `measured` stands for what the method would measure on texts."""
    cls = methods()[f"merge:{method}"] if isinstance(method, str) else method
    step = cls.model_validate({"merge": cls.name, **fields})
    assert isinstance(step, MergeMethod)
    weights = InMemory(base)
    model = Model(weights, config or {"num_hidden_layers": 2})
    deltas = {name: WeightsDelta(InMemory(b)) for name, b in tuned.items()}
    merged = MergedWeights(model, model, step, StepBricks(deltas), measured=measured)
    return {name: load(merged, name, dtype, CPU) for name in base}


def models(
    count: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and bricks: two layers of a matrix and a vector, an embedding."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(near: dict[str, Tensor] | None) -> dict[str, Tensor]:
        shapes = {
            "embed": (20, 6),
            "layers.0.w": (12, 10),
            "layers.0.b": (12,),
            "layers.1.w": (12, 10),
            "layers.1.b": (12,),
            "norm": (6,),
        }
        noise = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        return {n: (t if near is None else near[n].float() + 0.1 * t).to(dtype) for n, t in noise.items()}

    base = tensors(None)
    return base, {f"brick{i}": tensors(base) for i in range(count)}


def close(one: dict[str, Tensor], two: dict[str, Tensor], base: dict[str, Tensor], ulps: float = 1) -> None:
    """Equal to `ulps` units in the last place of the larger of result and base."""
    for name in base:
        a, b, c = (t[name].float() for t in (one, two, base))
        dtype = one[name].dtype
        bound = ulps * ULP[dtype] * torch.maximum(b.abs(), c.abs()) + TINY[dtype]
        assert ((a - b).abs() <= bound).all(), (name, float(((a - b).abs() / bound).max()))


BASE = torch.tensor([[1.0, -2.0, 0.5], [0.25, 4.0, -1.0]])
ONE = torch.tensor([[0.6, -0.1, 0.3], [0.2, -0.5, 0.4]])  # delta of the first brick
TWO = torch.tensor([[-0.2, -0.4, 0.5], [0.3, 0.1, -0.6]])  # of the second


def reference_trim(delta: Tensor, density: float) -> Tensor:
    """The largest by magnitude, first ones first among equals."""
    flat = delta.reshape(-1)
    kept = torch.argsort(-flat.abs(), stable=True)[: keep_count(flat.numel(), density)]
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(delta.shape)
