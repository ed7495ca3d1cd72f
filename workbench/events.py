"""What happens during a command, as events for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # task, requests done, requests in all


Events = Callable[[dict[str, Any]], None]


def no_events(_event: dict[str, Any]) -> None:
    """Ignore events."""
