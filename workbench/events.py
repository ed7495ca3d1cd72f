"""Events that report the progress of a command to the code that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]
"""Callback that takes (task, requests done, requests in total)."""
Events = Callable[[dict[str, Any]], None]
"""Callback that takes an event as plain data."""


def no_events(_event: dict[str, Any]) -> None:
    """Ignore an event."""


def progress(events: Events, stage: str, step: str) -> Callable[[int, int, str], None]:
    """Return a function (done, total, text) that sends events of a step.

    Args:
        events: Called with each event.
        stage: The stage: "edit", "measure" or "train".
        step: The step's id, or another name of the work.
    """
    return lambda done, total, text: events({"stage": stage, "step": step, "done": done, "total": total, "text": text})
