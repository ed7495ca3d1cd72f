"""Source of a `Combination`: one pass that sums stored blocks, and adds low-rank deltas as one product of stacked factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.merge.streaming.readers import Operand
from workbench.steps import Combination
from workbench.weights import kernels
from workbench.weights.lowrank import Factors, summed
from workbench.weights.specs import Source, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.merge.streaming.deltas import DeltaSource
    from workbench.merge.streaming.group import TensorGroup


class CombinedSource:
    """One tensor of θ₀ + Σ wᵢτᵢ + base·θ₀, or of the same delta on other weights.

    If the sum does not depend on θ₀ (means of checkpoints), the base is not read, and the first model takes its place.

    Args:
        group: The tensor's inputs.
        combination: Weights of the deltas and of the base.
        current: Weights that the delta is added to; None for the base's.
    """

    def __init__(self, group: TensorGroup, combination: Combination, current: Source | None) -> None:
        self._group, self._current = group, current
        self._models: list[tuple[Operand, float]] = []
        self._deltas: list[tuple[DeltaSource, float]] = []
        low: list[tuple[float, Factors]] = []
        for brick, weight in zip(group.sources.values(), combination.weights, strict=True):
            if not brick.touches(group.tensor):
                continue
            if source := brick.open_model(group.tensor, group.device):
                self._models.append((Operand(source, group.spec, group.device), weight))
            elif factors := brick.factors(group.tensor, group.device):
                low.append((weight, factors))
            else:
                self._deltas.append((brick.open_delta(group.tensor, group.device), weight))
        self._low = summed(low) if low else None
        self._choose_anchor(combination)
        self._scratch = buffer(group.spec, group.device) if current or self._deltas else None

    def _choose_anchor(self, combination: Combination) -> None:
        """Choose the anchor of out = scale · anchor + Σ w (model − anchor): the base, or the first model if θ₀ cancels out."""
        weights = [weight for _, weight in self._models]
        base_weight = 1 + combination.base - sum(weights)
        if self._current is None and self._models and not self._deltas and abs(base_weight) < 1e-9:
            self._anchor, self._others = self._models[0][0], self._models[1:]
            self._scale = 1.0 if abs(combination.base) < 1e-9 else sum(weights)
        else:
            self._anchor, self._others = Operand(self._group.base, self._group.spec, self._group.device), self._models
            self._scale = combination.base + (1.0 if self._current is None else 0.0)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32."""
        anchor = self._anchor.rows(start, stop)
        others = [model.rows(start, stop) for model, _ in self._others]
        if not kernels.combine(anchor, self._scale, others, [weight for _, weight in self._others], out):
            for model in (self._anchor, *(model for model, _ in self._others)):
                model.refuse_non_finite(start, stop)
        if self._low is not None:
            kernels.multiply(self._low.left[start:stop], self._low.right, out, add=True)
        if self._scratch is None:
            return
        scratch = matrix(self._scratch, start, stop, self._group.spec.cols)
        for delta, weight in self._deltas:
            delta.read_delta(start, stop, anchor.float(), scratch)
            out.add_(scratch.mul_(weight))
        if self._current is not None:
            self._current.read(start, stop, scratch)
            out.add_(scratch)
