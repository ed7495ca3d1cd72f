"""What happens during a command, as events for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # task, requests done, requests in all


Events = Callable[[dict[str, Any]], None]


def no_events(_event: dict[str, Any]) -> None:
    """Ignore events."""


def progress(events: Events, stage: str, step: str) -> Callable[[int, int, str], None]:
    """Return a function (done, total, text) that sends events of a step.

    Args:
        events: Receives them.
        stage: What is going on: "edit", "measure", "train".
        step: The step's id, or another name for what is going on.
    """
    return lambda done, total, text: events({"stage": stage, "step": step, "done": done, "total": total, "text": text})
