"""A brick as a merge reads it: the protocol of a delta."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source


class DeltaSource(Protocol):
    """One tensor's delta, readable in row blocks."""

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with the delta of rows start..stop; `base` holds the base's same rows."""


class Deltas(Protocol):
    """A brick as a merge sees it: fine-tuned minus base."""

    def touches(self, name: str) -> bool:
        """Whether the brick may differ from the base at this tensor of the base."""

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Prepare the delta of one tensor that the brick touches."""

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """The delta of one tensor as a low-rank product, exactly; None where it is not one."""

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """The fine-tuned tensor itself, where the brick holds it; None where it holds an update."""
