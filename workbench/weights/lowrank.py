"""Low-rank deltas: a LoRA adapter's update of a weight, kept as factors until a block of it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.weights.specs import Source, TensorSpec, Weights, buffer, matrix


@dataclass(frozen=True)
class Factors:
    """An update of one weight: `left @ right`, with the adapter's scale folded into `right`.

    Attributes:
        left: [rows, rank], float32.
        right: [rank, cols], float32.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.right.shape[0]

    @classmethod
    def zero(cls, spec: TensorSpec, device: torch.device) -> Factors:
        """The update of rank 0: none."""
        return cls(torch.zeros(spec.rows, 0, device=device), torch.zeros(0, spec.cols, device=device))

    @classmethod
    def of_dense(cls, delta: Tensor) -> Factors:
        """A matrix as a product of itself with the identity on its smaller side: exact to the bit, at rank min(rows, cols).

        It is smaller than the product only below rank rows · cols / (rows + cols); above, this is the smallest exact one.

        Args:
            delta: [rows, cols].
        """
        rows, cols = delta.shape
        delta = delta.float().contiguous()
        if rows <= cols:
            return cls(torch.eye(rows, device=delta.device), delta)
        return cls(delta, torch.eye(cols, device=delta.device))

    def transposed(self) -> Factors:
        """The same update of a weight that is stored [in, out] (Conv1D)."""
        return Factors(self.right.T.contiguous(), self.left.T.contiguous())


def summed(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Σ wᵢ·leftᵢ·rightᵢ as one product: left factors side by side, right factors, with their weights, below each other.

    Args:
        parts: At least one (weight, factors); all [rows, ·] and [·, cols] of one weight matrix.
    """
    return Factors(torch.cat([f.left for _, f in parts], 1), torch.cat([f.right * w for w, f in parts], 0))


def low_rank_update(weights: Weights, base: Weights, name: str, device: torch.device) -> Factors | None:
    """What the steps between `base` and `weights` have added to one tensor, as a low-rank product, exactly.

    Follows the steps' `update(name, device)` and `current` down to the base; rank 0 where no step reaches the tensor,
    None where a step's result is not such a product.
    """
    spec = base.specs[name]
    found: list[tuple[float, Factors]] = []
    while weights is not base:
        if not hasattr(weights, "update") or not hasattr(weights, "current"):
            return None
        part = weights.update(name, device)
        if part is None:
            return None
        found.append((1.0, part))
        weights = weights.current
    return summed([(1.0, Factors.zero(spec, device)), *reversed(found)])


class LowRankSource:
    """Row blocks of `left @ right`."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self._left = factors.left.to(device)
        self._right = factors.right.to(device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the product."""
        torch.mm(self._left[start:stop], self._right, out=out)


class LowRankSum:
    """Weights plus a low-rank delta: what an edit makes of the current model.

    Args:
        current: The model before.
        factors: Tensor name -> update.
    """

    def __init__(self, current: Weights, factors: Mapping[str, Factors]) -> None:
        self.current = current
        self._factors = factors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As before: an edit changes no shape."""
        return self.current.specs

    def origin(self, name: str) -> str | None:
        """As before."""
        return self.current.origin(name)

    def update(self, name: str, device: torch.device) -> Factors:
        """What this sum adds to one tensor."""
        if name not in self._factors:
            return Factors.zero(self.specs[name], device)
        return Factors(self._factors[name].left.to(device), self._factors[name].right.to(device))

    def open(self, name: str, device: torch.device) -> Source:
        """The tensor itself where the delta does not reach, else the sum."""
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
