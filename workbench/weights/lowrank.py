"""Low-rank deltas: a LoRA adapter's update of a weight, kept as factors until a block of it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
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

    def transposed(self) -> Factors:
        """The same update of a weight that is stored [in, out] (Conv1D)."""
        return Factors(self.right.T.contiguous(), self.left.T.contiguous())


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
        self._current = current
        self._factors = factors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As before: an edit changes no shape."""
        return self._current.specs

    def origin(self, name: str) -> str | None:
        """As before."""
        return self._current.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """The tensor itself where the delta does not reach, else the sum."""
        source = self._current.open(name, device)
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
