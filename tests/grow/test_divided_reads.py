"""Tensors that several grown tensors take columns of are read once, and give the same bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from worlds.merging import InMemory
from worlds.project import CPU

from workbench.grow.expansion.remap import GrownWeights
from workbench.steps import NEW, Axis, Grown, Growth
from workbench.weights.device import load_all

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 4, 10, 24


class Counting(InMemory):
    """Weights that count the rows that are read of each tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.rows: Counter[str] = Counter()

    def open(self, name: str, device: torch.device) -> Any:
        reader = super().open(name, device)
        counted = self.rows

        class Reader:
            def read(self, start: int, stop: int, out: torch.Tensor) -> None:
                counted[name] += stop - start
                reader.read(start, stop, out)

        return Reader()


def world(dtype: torch.dtype = torch.bfloat16) -> tuple[Counting, dict[int, np.ndarray[Any, Any]]]:
    """Three matrices out of neurons, and the neurons of each expert in a random order."""
    draw = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}.down": torch.randn(ROWS, COLUMNS, generator=draw).to(dtype) for n in range(LAYERS)}
    orders = {n: torch.randperm(COLUMNS, generator=draw).numpy().reshape(EXPERTS, -1) for n in range(LAYERS)}
    return Counting(tensors), orders


def test_each_expert_its_own_tensor() -> None:
    weights, orders = world()
    plan = {
        f"layers.{n}.experts.{e}.down": Grown(f"layers.{n}.down", cols=Axis(order[e]), scale=3.0)
        for n, order in orders.items()
        for e in range(EXPERTS)
    }
    grown = GrownWeights(weights, Growth(plan, {}))
    made = load_all(grown, None, CPU, threads=1)
    for n, order in orders.items():
        for e in range(EXPERTS):
            expected = (weights.tensors[f"layers.{n}.down"].float()[:, order[e]] * 3.0).to(torch.bfloat16)
            assert torch.equal(made[f"layers.{n}.experts.{e}.down"], expected)
    assert weights.rows == {f"layers.{n}.down": ROWS for n in range(LAYERS)}
    assert grown.held_bytes == 2 * 4 * ROWS * COLUMNS
    again = load_all(grown, None, CPU, threads=4)
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())


def test_experts_in_one_tensor() -> None:
    weights, orders = world(torch.float32)
    parts = {n: tuple(Grown(f"layers.{n}.down", cols=Axis(own)) for own in order) for n, order in orders.items()}
    plan = {
        f"layers.{n}.fused": Grown(f"layers.{n}.down", parts=of, shape=(EXPERTS, ROWS, COLUMNS // EXPERTS))
        for n, of in parts.items()
    }
    made = load_all(GrownWeights(weights, Growth(plan, {})), None, CPU, threads=1)
    for n, order in orders.items():
        expected = torch.stack([weights.tensors[f"layers.{n}.down"][:, own] for own in order])
        assert torch.equal(made[f"layers.{n}.fused"], expected)
    assert weights.rows == {f"layers.{n}.down": ROWS for n in range(LAYERS)}


def test_tensors_with_all_columns_are_not_held() -> None:
    """Copies of a widened layer keep all columns of their source: they are streamed in blocks, as before."""
    weights, _ = world()
    wide = Axis(np.concatenate([np.arange(COLUMNS), np.full(4, NEW)]))
    plan = {f"layers.{n}.down": Grown("layers.0.down", cols=wide, new=n > 0) for n in range(2)}
    grown = GrownWeights(weights, Growth(plan, {}))
    assert grown.held_bytes == 0
    load_all(grown, None, CPU, threads=1)
    assert weights.rows == {"layers.0.down": 2 * ROWS}
