"""Events that report the progress of a command to the code that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Required, TypedDict

Progress = Callable[[str, int, int], None]
"""Callback that takes (task, requests done, requests in total)."""


class Whole(TypedDict):
    """Progress of a whole evaluation."""

    share: float
    """Share of the work that is done, from 0 to 1."""
    left: float | None
    """Seconds of the remaining work; None if they cannot be estimated yet."""
    finished: int
    """Number of configurations that are scored."""
    of: int
    """Number of configurations."""


class Event(TypedDict, total=False):
    """Progress of a command. `log.jsonl` of a run holds its events."""

    stage: Required[str]
    """Part of the work, such as "edit", "measure" or "train"."""
    step: str
    """The step's id, or another name of the work."""
    text: str
    """A line for the user."""
    done: int
    total: int
    configuration: str
    """The configuration that is scored, number `number` of `of`."""
    number: int
    of: int
    scored: str
    """The suite under which the configuration is scored now."""
    overall: Whole


Events = Callable[[Event], None]
"""Callback that takes an event."""


def no_events(_event: Event) -> None:
    """Ignore an event."""


def progress(events: Events, stage: str, step: str) -> Callable[[int, int, str], None]:
    """Return a function (done, total, text) that sends events of a step.

    Args:
        events: Called with each event.
        stage: The stage: "edit", "measure" or "train".
        step: The step's id, or another name of the work.
    """
    return lambda done, total, text: events({"stage": stage, "step": step, "done": done, "total": total, "text": text})
