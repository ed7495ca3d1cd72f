"""Low-rank deltas, such as a LoRA adapter's update of a weight, stored as factors and multiplied block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.weights.kernels import multiply
from workbench.weights.specs import Source, TensorSpec, Weights, buffer, joined, matrix, zeros

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """An update of one weight, `left @ right`; the adapter's scale is part of `right`.

    Attributes:
        left: [rows, rank], float32.
        right: [rank, cols], float32.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.right.shape[0]

    @classmethod
    def zero(cls, spec: TensorSpec, device: torch.device) -> Factors:
        """Return an update of rank 0, which changes nothing."""
        return cls(zeros(spec.rows, 0, device), zeros(0, spec.cols, device))

    @classmethod
    def of_dense(cls, delta: Tensor) -> Factors:
        """Return a dense matrix as a bit-exact product of itself and an identity matrix on its smaller side.

        Args:
            delta: [rows, cols]. The product has rank min(rows, cols).
        """
        rows, cols = delta.shape
        delta = delta.float().contiguous()
        if rows <= cols:
            return cls(torch.eye(rows, device=delta.device), delta)
        return cls(delta, torch.eye(cols, device=delta.device))

    def transposed(self) -> Factors:
        """Return the same update for a weight that is stored as [in, out] (Conv1D)."""
        return Factors(self.right.T.contiguous(), self.left.T.contiguous())


def summed(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Return Σ wᵢ·leftᵢ·rightᵢ as one product, by concatenating the left factors and the weighted right factors.

    Args:
        parts: At least one pair (weight, factors), all for the same weight matrix.
    """
    return Factors(joined([f.left for _, f in parts], 1), joined([f.right * w for w, f in parts], 0))


def low_rank_update(weights: Weights, base: Weights, name: str, device: torch.device) -> Factors | None:
    """Return exactly what the steps between `base` and `weights` have added to one tensor, as a low-rank product.

    Args:
        weights: The result of the steps. Each step has `update(name, device)` and `current`, the weights before it.
        base: The base's weights.
        name: The tensor.
        device: The device of the factors.

    Returns:
        The product, of rank 0 if no step changes the tensor; None if a step's result is not a low-rank product.
    """
    spec = base.specs[name]
    updates: list[tuple[float, Factors]] = []
    while weights is not base:
        if not hasattr(weights, "update") or not hasattr(weights, "current"):
            return None
        part = weights.update(name, device)
        if part is None:
            return None
        updates.append((1.0, part))
        weights = weights.current
    return summed([(1.0, Factors.zero(spec, device)), *reversed(updates)])


class LowRankSource:
    """Reader of row blocks of `left @ right`."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self._left = factors.left.to(device)
        self._right = factors.right.to(device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the product."""
        multiply(self._left[start:stop], self._right, out)


class LowRankSum:
    """Weights plus a low-rank delta, such as the result of an edit.

    Args:
        current: The weights before.
        factors: Tensor name -> update.
    """

    def __init__(self, current: Weights, factors: Mapping[str, Factors]) -> None:
        self.current = current
        self._factors = factors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the current weights, since an edit changes no shape."""
        return self.current.specs

    def origin(self, name: str) -> str | None:
        """Delegate to the current weights."""
        return self.current.origin(name)

    def update(self, name: str, device: torch.device) -> Factors:
        """Return the update of one tensor, of rank 0 if it has none."""
        if name not in self._factors:
            return Factors.zero(self.specs[name], device)
        return Factors(self._factors[name].left.to(device), self._factors[name].right.to(device))

    def open(self, name: str, device: torch.device) -> Source:
        """Open the sum, or the current tensor itself if it has no update."""
        source = self.current.open(name, device)
        if name not in self._factors:
            return source
        return _SumSource(source, LowRankSource(self._factors[name], device), self.specs[name], device)


class _SumSource:
    def __init__(self, left: Source, right: Source, spec: TensorSpec, device: torch.device) -> None:
        self._left, self._right = left, right
        self._cols = spec.cols
        self._scratch = buffer(spec, device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        update = matrix(self._scratch, start, stop, self._cols)
        self._left.read(start, stop, out)
        self._right.read(start, stop, update)
        out.add_(update)
