"""The growing reports of `eval --watch` and `search --watch`: what the page shows while configurations are scored."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.subjects import Opened
from workbench.cli._output import out, time_left
from workbench.cli._recipes import compare_scores
from workbench.errors import UsageError, WorkbenchError
from workbench.events import Event, Events

if TYPE_CHECKING:
    from workbench.search.result import SearchResult
    from workbench.search.run import Search
    from workbench.search.study import Study
    from workbench.view.growing import Growing
    from workbench.view.pages import Work

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
def watching(opened: Opened, against: str | None, watch: bool, port: int | None) -> Iterator[Events]:
    """Yield the receiver of an evaluation's progress events: the terminal, and with `--watch` the page as well.

    Args:
        opened: What is scored.
        against: Name of the baseline; None if the suite decides.
        watch: Value of `--watch`.
        port: Value of `--port`.
    """
    if not watch:
        yield out.event
        return
    with _served("evaluation", port) as growing:
        page = _Comparison(growing, opened, against)
        yield page.event
        page.show(growing)


@contextmanager
def watching_search(watch: bool, port: int | None) -> Iterator[WatchedSearch]:
    """Yield the receiver of a search's events; the page is served from here on.

    Args:
        watch: Value of `--watch`.
        port: Value of `--port`.
    """
    if not watch:
        yield WatchedSearch(None)
        return
    with _served("search", port) as growing:
        page = WatchedSearch(growing)
        try:
            yield page
        finally:
            page.close()


@contextmanager
def _served(work: Work, port: int | None) -> Iterator[Growing]:
    """Serve a growing page, and the other pages of the viewer beside it, until the block ends."""
    from workbench.view.app import application
    from workbench.view.growing import Growing
    from workbench.view.pages import LINKS, Site
    from workbench.view.server import Served

    site = Site(links=[(name, path) for name, path in LINKS if name != "Chat"])  # the device is at work
    growing = Growing(site, work)
    with Served(application(site, growing=growing), port or 0) as served:
        out.always(ADDRESS.format(served.url))
        try:
            yield growing
        except BaseException:
            growing.end(wait=False)
            raise
        growing.end(wait=True)


class _Page(ABC):
    """Passes events on to the terminal, and shows new scores on the page, if there is one, not too often."""

    def __init__(self, growing: Growing | None) -> None:
        self._growing = growing
        self._next = 0.0

    def event(self, event: Event) -> None:
        """Take a progress event."""
        out.event(event)
        if self._growing is not None and self.tell(event, self._growing) and time.monotonic() >= self._next:
            started = time.monotonic()
            self.show(self._growing)
            ended = time.monotonic()
            self._next = ended + max(_PAUSE, (ended - started) / _SHARE)

    @abstractmethod
    def tell(self, event: Event, growing: Growing) -> bool:
        """Tell open pages how far the work is, and return True if the event can mean new scores."""

    @abstractmethod
    def show(self, growing: Growing) -> None:
        """Show the report of all scores that are stored now; nothing if there is nothing to show yet."""


class _Comparison(_Page):
    """The page of an evaluation."""

    def __init__(self, growing: Growing, opened: Opened, against: str | None) -> None:
        super().__init__(growing)
        self.opened, self.against = opened, against

    def tell(self, event: Event, growing: Growing) -> bool:
        """Tell open pages how far the evaluation is."""
        whole = event.get("overall")
        if whole:
            now = f"; now {event['configuration']}: {event['text']}" if event.get("text") else ""
            growing.say(
                f"{whole['finished']} of {whole['of']} configurations are scored, {100 * whole['share']:.0f} % of the items"
                f"{time_left(whole)}{now}."
            )
        return "scored" in event or (event.get("stage") == "score" and "configuration" not in event)

    def show(self, growing: Growing) -> None:
        """Show the comparison of all scores that are stored now; nothing if they cannot be compared yet."""
        from workbench.evaluate.scoring import stored

        opened = self.opened
        try:
            scores, missing = stored(opened.entries, opened.plans, opened.store, self.against)
            if len({s.configuration.name for s in scores}) < 2:
                return
            comparison = compare_scores(opened.store, scores, self.against, opened.project, opened.sweeps)
        except WorkbenchError as error:  # the evaluation goes on; at its end the same comparison is made again
            growing.say(f"The scores so far cannot be compared: {error.message.splitlines()[0]}")
            return
        waiting = [f"Not scored yet: {', '.join(missing)}."] if missing else []
        growing.show(comparison.warned(waiting))


class WatchedSearch(_Page):
    """The page of a search. The study is opened a second time, so that candidates of other processes are on the page as well."""

    def __init__(self, growing: Growing | None) -> None:
        super().__init__(growing)
        self._search: Search | None = None
        self._study: Study | None = None

    def follow(self, search: Search) -> None:
        """Show the candidates of a search from now on."""
        self._search = search

    def end(self, found: SearchResult) -> None:
        """Show the report of the finished search."""
        if self._growing is not None:
            self._growing.show(found)

    def tell(self, event: Event, growing: Growing) -> bool:
        """Tell open pages how far the search is."""
        text = str(event.get("text", ""))
        if "done" in event:
            text = f"{event['done']} of {event['total']} candidates are finished; {text}"
        if text:
            growing.say(f"{text[0].upper()}{text[1:]}.")
        return event.get("stage") == "search"

    def show(self, growing: Growing) -> None:
        """Show the controls and candidates that are scored now; nothing before the first control."""
        from workbench.search.run import open_study
        from workbench.search.winner import growing as so_far

        search = self._search
        if search is None or not search.controls:
            return
        try:
            self._study = self._study or open_study(search)
            state = so_far(search, self._study)
        except WorkbenchError as error:  # the search meets the same error where it matters
            growing.say(f"The candidates so far cannot be shown: {error.message.splitlines()[0]}")
            return
        growing.show(state)

    def close(self) -> None:
        """Release the study."""
        if self._study is not None:
            self._study.close()
