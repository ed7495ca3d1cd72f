"""Deltas of a brick on some neurons only: all other rows and columns of the masked tensors are zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.merge.streaming.deltas import Deltas, DeltaSource
from workbench.weights.lowrank import Factors
from workbench.weights.masks import TensorMask
from workbench.weights.specs import Source

if TYPE_CHECKING:
    from torch import Tensor


class MaskedDeltas:
    """Deltas that are zero outside the chosen rows or columns. Low-rank deltas stay low-rank. Implements `Deltas`.

    Args:
        inner: The brick's deltas.
        masks: Tensor of the base -> rows or columns to keep. Other tensors keep their whole delta.
    """

    def __init__(self, inner: Deltas, masks: Mapping[str, TensorMask]) -> None:
        self._inner = inner
        self._masks = masks

    def touches(self, name: str) -> bool:
        """Return whether the brick may differ from the base at a chosen row or column of this tensor."""
        return self._inner.touches(name) and not (name in self._masks and self._masks[name].empty)

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Open the delta of one tensor."""
        source = self._inner.open_delta(name, device)
        return _MaskedDelta(source, self._masks[name].to(device)) if name in self._masks else source

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor; None for a masked tensor, which no file holds."""
        return None if name in self._masks else self._inner.open_model(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the factors with zeros in the rows of the left one, or in the columns of the right one."""
        factors = self._inner.factors(name, device)
        return self._masks[name].to(device).factors(factors) if factors is not None and name in self._masks else factors


class _MaskedDelta:
    def __init__(self, source: DeltaSource, mask: TensorMask) -> None:
        self._source, self._mask = source, mask

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        if self._mask.skips(start, stop):
            out.zero_()
            return
        self._source.read_delta(start, stop, base, out)
        self._mask.keep(start, stop, out)
