"""Progress events that a command sends to the code that displays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with a task, the number of finished requests and the number of all requests."""
Events = Callable[[dict[str, Any]], None]
"""Called with one event, such as `{"stage": "merge", "step": "mix", "done": 3, "total": 8}`."""


def no_events(_event: dict[str, Any]) -> None:
    """Ignore an event."""
