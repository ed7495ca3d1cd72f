"""Deltas of an adapter, mapped to another vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from workbench.lazy import torch
from workbench.merge.streaming.deltas import Deltas, DeltaSource
from workbench.weights.lowrank import Factors
from workbench.weights.row_alignment import runs
from workbench.weights.specs import Source

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.weights.row_alignment import Index


class AlignedDeltas:
    """Deltas with rows moved from the base's vocabulary to the output's; zero in rows that the base does not have.

    Args:
        inner: Deltas on the base as stored on disk.
        index: [rows of the output], the base's row or -1.
        tensors: Names of the tensors that have one row per token.
    """

    def __init__(self, inner: Deltas, index: Index, tensors: Collection[str]) -> None:
        self._inner = inner
        self._index = index
        self._tensors = tensors

    def touches(self, name: str) -> bool:
        """Return whether the adapter may differ from the base at this tensor."""
        return self._inner.touches(name)

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Open the delta of one tensor."""
        source = self._inner.open_delta(name, device)
        return _AlignedDelta(source, self._index) if name in self._tensors else source

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor if its rows do not move; otherwise return None."""
        return None if name in self._tensors else self._inner.open_model(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the factors, with the rows of the left factor moved."""
        factors = self._inner.factors(name, device)
        if factors is None or name not in self._tensors:
            return factors
        left = torch.cat([factors.left, factors.left.new_zeros(1, factors.rank)])
        return Factors(left[torch.from_numpy(self._index).to(device)], factors.right)


class _AlignedDelta:
    def __init__(self, source: DeltaSource, index: Index) -> None:
        self._source = source
        self._index = index

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        index = self._index[start:stop]
        places = np.flatnonzero(index >= 0)
        if len(places) < len(index):
            out.zero_()
        if len(places):
            for offset, row, length in runs(places, index[places]):
                self._source.read_delta(row, row + length, base[offset : offset + length], out[offset : offset + length])
