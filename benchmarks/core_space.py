"""Measure spectral merges of LoRA adapters on one layer: from their factors in the core space, and from dense deltas.

    python benchmarks/core_space.py

Eight random adapters of rank 16 on a 4096 x 4096 layer, float32. `basis` is what the core space adds: the common bases and the
core matrices. `tsv` and `iso_c` include reading the factors, the basis and the merged tensor; `whole` gives the method the same
deltas as checkpoints have them, without their factors: one eigendecomposition of a Gram matrix in float64 a decomposed matrix.
CPU seconds of one thread. Results go to benchmarks/results/core-space.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write_results
from torch import Tensor

from workbench.adapters.dense import DeltaRows
from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.merged import MergedWeights, core_group
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod
from workbench.weights.lowrank import Factors, LowRankSource
from workbench.weights.specs import Source, TensorSpec, load

CPU = torch.device("cpu")
NAME = "layer.weight"


class Zeros:
    """A base with one tensor of zeros, so that the merged tensor is the merged delta."""

    def __init__(self, size: int) -> None:
        self.specs = {NAME: TensorSpec.of((size, size), torch.float32)}

    def origin(self, name: str) -> str:
        """Return the same name."""
        return name

    def open(self, _name: str, _device: torch.device) -> Source:
        """Return the tensor's source."""
        return self

    def read(self, _start: int, _stop: int, out: Tensor) -> None:
        """Write zeros."""
        out.zero_()


class Lora:
    """An adapter on that tensor; `whole` hides its factors, like a checkpoint."""

    def __init__(self, factors: Factors, whole: bool) -> None:
        self._factors = factors
        self._whole = whole

    def touches(self, _name: str) -> bool:
        """Return True."""
        return True

    def factors(self, _name: str, _device: torch.device) -> Factors | None:
        """Return the factors, or None if they are hidden."""
        return None if self._whole else self._factors

    def open_delta(self, _name: str, device: torch.device) -> DeltaRows:
        """Return the source of the product's rows."""
        self._product = LowRankSource(self._factors, device)
        return self

    def open_model(self, _name: str, _device: torch.device) -> Source | None:
        """Return None: an adapter stores an update."""
        return None

    def read_delta(self, start: int, stop: int, _base: Tensor, out: Tensor) -> None:
        """Read rows of the product."""
        self._product.read(start, stop, out)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    start = time.process_time()
    result = work()
    return round(time.process_time() - start, 3), result


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    factors = [
        Factors(
            torch.randn(options.size, options.rank, generator=generator) * 0.02,
            torch.randn(options.rank, options.size, generator=generator) * 0.02,
        )
        for _ in range(options.adapters)
    ]
    model = Model(Zeros(options.size), {"num_hidden_layers": 1})

    def step(method: str, whole: bool) -> MergedWeights:
        cls = methods()[f"merge:{method}"]
        merge_step = cls.model_validate({"merge": method})
        assert isinstance(merge_step, MergeMethod)
        return MergedWeights(model, model, merge_step, StepBricks({f"b{i}": Lora(f, whole) for i, f in enumerate(factors)}))

    rows: list[dict[str, Any]] = []
    warm = step("task_arithmetic", False)
    timed(lambda: load(warm, NAME, torch.float32))
    tsv = methods()["merge:tsv"].model_validate({"merge": "tsv"})
    basis, _ = timed(lambda: core_group(tsv, warm.group(NAME, CPU)))  # type: ignore[arg-type]
    for method in ("tsv", "iso_c"):
        factored, one = timed(lambda m=method: load(step(m, False), NAME, torch.float32))  # type: ignore[misc]
        whole, two = timed(lambda m=method: load(step(m, True), NAME, torch.float32))  # type: ignore[misc]
        difference = float((one - two).norm() / two.norm())
        row = {
            "method": method,
            "factors_seconds": factored,
            "whole_seconds": whole,
            "ratio": round(whole / factored),
            "relative_difference": float(f"{difference:.1e}"),
        }
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    write_results(
        Path(__file__).parent / "results" / "core-space.json",
        {
            "size": options.size,
            "adapters": options.adapters,
            "rank": options.rank,
            "threads": 1,
            "torch": torch.__version__,
            "basis_seconds": basis,
            "rows": rows,
        },
    )
    sys.stdout.write(f"basis {basis} s\n")


if __name__ == "__main__":
    main()
