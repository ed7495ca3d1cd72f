"""Where a piece of work computes, and who hears of its progress."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.events import Events, no_events
from workbench.lazy import torch
from workbench.weights.device import default_threads


@dataclass(frozen=True)
class Work:
    """Where a piece of work on tensors computes, and who hears of its progress.

    Attributes:
        device: Device to compute on.
        asked: Number of tensors computed at the same time; None leaves it to `threads`.
        events: Callback that receives progress events.
    """

    device: torch.device
    asked: int | None = None
    events: Events = no_events

    @property
    def threads(self) -> int:
        """Number of tensors computed at the same time: one per core, at most 8, unless another number is asked for."""
        return self.asked or default_threads()
