"""The option --watch: a growing report, which a part of the workbench shows while configurations are scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from workbench.console.output import out, time_left
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.events import Event
from workbench.ground.parts import hook

Report = Callable[[], Any]
"""Returns the document of all scores that are stored; None if there is none yet."""


class Page(Protocol):
    """A page with the growing report."""

    def say(self, text: str) -> None:
        """Show how far the work is."""

    def show(self, document: Any) -> None:
        """Show a report in place of the one before."""


WatchOpt = Annotated[
    bool, typer.Option("--watch", help="Show the growing report at an address of this machine until the command ends.")
]
PortOpt = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port of --watch; default: a free one.")
]
_PAUSE = 2.0
"""Smallest number of seconds between two reports."""
_SHARE = 0.1
"""Largest share of the time that is spent on reports."""


def check_watch(watch: bool, port: int | None) -> None:
    """Check the options before any work.

    Args:
        watch: Value of `--watch`.
        port: Value of `--port`.

    Raises:
        UsageError: If one option lacks the other, or the port cannot be used.
        WorkbenchError: If the part that shows the report is missing.
    """
    if port is not None and not watch:
        raise UsageError(f"--port {port}: nothing is shown without --watch", f"--watch --port {port}")
    if watch:
        hook("watch", "--watch").check(port or 0)


@contextmanager
def watching(work: str, watch: bool, port: int | None, report: Report = lambda: None) -> Iterator[Watched]:
    """Yield the receiver of progress events: the terminal, and with `--watch` a page, served beside the other pages of the viewer.

    Args:
        work: What the command does.
        watch: Value of `--watch`.
        port: Value of `--port`.
        report: Returns the report of all scores that are stored; None if there is none yet.
    """
    if not watch:
        yield Watched(None, report)
        return
    with hook("watch", "--watch").page(work, port or 0, out.always) as page:
        watched = Watched(page, report)
        yield watched
        watched.show()


class Watched:
    """Passes events on to the terminal, and shows new scores on the page, if there is one, not too often."""

    def __init__(self, page: Page | None, report: Report) -> None:
        self._page, self._report, self._next = page, report, 0.0

    def follow(self, report: Report) -> None:
        """Show what a function returns from now on."""
        self._report = report

    def event(self, event: Event) -> None:
        """Take a progress event."""
        out.event(event)
        if self._page is None:
            return
        if text := _said(event):
            self._page.say(text)
        if _may_have_scored(event) and time.monotonic() >= self._next:
            started = time.monotonic()
            self.show()
            ended = time.monotonic()
            self._next = ended + max(_PAUSE, (ended - started) / _SHARE)

    def show(self) -> None:
        """Show the report as it is now."""
        assert self._page
        try:
            report = self._report()
        except WorkbenchError as error:  # the command goes on, and meets the same error where it matters
            self._page.say(f"The scores so far cannot be shown: {error.message.splitlines()[0]}")
            return
        if report is not None:
            self._page.show(report)


def _said(event: Event) -> str:
    """Return how far the work is, for open pages."""
    text = str(event.get("text", ""))
    if whole := event.get("overall"):
        scored = f"{whole['finished']} of {whole['of']} configurations are scored, {100 * whole['share']:.0f} % of the items"
        return f"{scored}{time_left(whole)}" + (f"; now {event['configuration']}: {text}." if text else ".")
    if "done" in event:
        counts = f"{event['done']} of {event['total']}"
        text = f"{counts} candidates are finished; {text}" if event["stage"] == "search" else f"{event['stage']} {counts}: {text}"
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _may_have_scored(event: Event) -> bool:
    return "scored" in event or event["stage"] == "search" or (event["stage"] == "score" and "configuration" not in event)
