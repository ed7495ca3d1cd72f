"""The growing reports of `eval --watch` and `search --watch`: what the page shows while configurations are scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.subjects import Opened
from workbench.cli._output import out, time_left
from workbench.cli._recipes import compare_scores
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.events import Event

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.search.result import SearchState
    from workbench.search.run import Search
    from workbench.view.growing import Growing
    from workbench.view.pages import Work

    Report = Callable[[], Comparison | SearchState | None]

WatchOpt = Annotated[
    bool, typer.Option("--watch", help="Show the growing report at an address of this machine until the command ends.")
]
PortOpt = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port of --watch; default: a free one.")
]
ADDRESS = "the report grows at {} until the command ends"
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
    """
    if port is not None and not watch:
        raise UsageError(f"--port {port}: nothing is shown without --watch", f"--watch --port {port}")
    if watch:
        from workbench.view.server import bound

        bound(port or 0).close()


@contextmanager
def watching(work: Work, watch: bool, port: int | None, report: Report = lambda: None) -> Iterator[Watched]:
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
    from workbench.view.app import application
    from workbench.view.growing import Growing
    from workbench.view.pages import LINKS, Site
    from workbench.view.server import Served

    site = Site(links=[(name, path) for name, path in LINKS if name != "Chat"])  # the device is at work
    growing = Growing(site, work)
    with Served(application(site, growing=growing), port or 0) as served:
        out.always(ADDRESS.format(served.url))
        try:
            page = Watched(growing, report)
            yield page
            page.show()
        except BaseException:
            growing.end(wait=False)
            raise
        growing.end(wait=True)


class Watched:
    """Passes events on to the terminal, and shows new scores on the page, if there is one, not too often."""

    def __init__(self, growing: Growing | None, report: Report) -> None:
        self._growing, self._report, self._next = growing, report, 0.0

    def follow(self, report: Report) -> None:
        """Show what a function returns from now on."""
        self._report = report

    def event(self, event: Event) -> None:
        """Take a progress event."""
        out.event(event)
        if self._growing is None:
            return
        if text := _said(event):
            self._growing.say(text)
        if _may_have_scored(event) and time.monotonic() >= self._next:
            started = time.monotonic()
            self.show()
            ended = time.monotonic()
            self._next = ended + max(_PAUSE, (ended - started) / _SHARE)

    def show(self) -> None:
        """Show the report as it is now."""
        assert self._growing
        try:
            report = self._report()
        except WorkbenchError as error:  # the command goes on, and meets the same error where it matters
            self._growing.say(f"The scores so far cannot be shown: {error.message.splitlines()[0]}")
            return
        if report is not None:
            self._growing.show(report)


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


def scored_so_far(opened: Opened, against: str | None) -> Comparison | None:
    """Return the comparison of all scores of an evaluation that are stored now; None before there are two configurations."""
    from workbench.evaluate.scoring import stored

    scores, missing = stored(opened.entries, opened.plans, opened.store, against)
    if len({s.configuration.name for s in scores}) < 2:
        return None
    comparison = compare_scores(opened.store, scores, against, opened.project, opened.sweeps)
    return comparison.warned([f"Not scored yet: {', '.join(missing)}."] if missing else [])


def searched_so_far(search: Search) -> SearchState | None:
    """Return the controls and candidates that are scored now, those of other processes among them; None before the first control."""
    from workbench.search.run import open_study
    from workbench.search.winner import growing

    if not search.controls:
        return None
    with closing(open_study(search)) as study:
        return growing(search, study)
