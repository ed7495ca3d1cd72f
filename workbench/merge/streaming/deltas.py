"""Protocols through which a merge reads a brick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from workbench.lazy import torch
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source

if TYPE_CHECKING:
    from torch import Tensor


class DeltaSource(Protocol):
    """The delta of one tensor, readable in blocks of rows."""

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with the delta of rows start..stop; `base` holds the same rows of the base."""


class Deltas(Protocol):
    """A brick's deltas: fine-tuned weights minus base."""

    def touches(self, name: str) -> bool:
        """Return whether the brick may differ from the base at this tensor."""

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Open the delta of one tensor that the brick touches."""

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the delta of one tensor as an exact low-rank product, or None if it is not one."""

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor itself, or return None if the brick stores an update instead."""
