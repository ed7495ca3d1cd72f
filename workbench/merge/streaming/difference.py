"""Deltas of a brick that is a full set of weights: its difference from the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.merge.streaming.deltas import DeltaSource
from workbench.weights import kernels
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, StoredSource, Weights

if TYPE_CHECKING:
    from torch import Tensor


class WeightsDelta:
    """Deltas of a full set of weights (a checkpoint, or another recipe's result): its difference from the base."""

    def __init__(self, weights: Weights, base: Weights) -> None:
        self._weights = weights
        self._base = base

    def touches(self, name: str) -> bool:
        """Return True: every tensor may differ."""
        return True

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Open θ − θ₀ of one tensor."""
        return _Difference(self._weights.open(name, device))

    def open_model(self, name: str, device: torch.device) -> Source:
        """Open θ of one tensor."""
        return self._weights.open(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return None: a difference of checkpoints has full rank."""
        return None


class _Difference:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._stored = source if isinstance(source, StoredSource) else None

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        if self._stored is None:
            self._source.read(start, stop, out)
            out.sub_(base)
        elif not kernels.difference(self._stored.raw(start, stop), base, out):
            self._stored.refuse_non_finite(start, stop)
