"""A page that grows: the report of an evaluation or a search of this process, which tells open browsers when it is a new one."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from workbench.report.page import Viewer, filled, html

_SEEN = 10.0
"""Seconds since its last request for which a page counts as open."""
_LAST = 5.0
"""Largest number of seconds that the end of the command waits for an open page to load the last report."""
_ALIVE = 15.0
"""Seconds after which a silent stream says something, so that a browser that is gone is noticed."""


def event(name: str, data: object = "") -> str:
    """Return a server-sent event with data as JSON."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class Pages:
    """The pages of one kind of work.

    Attributes:
        page: Function of the comparison or the search's document and the viewer that returns the page.
        eyebrow: The kind of work, above the heading of the page that is shown before there is a report.
        title: Heading of that page.
        lead: Sentence below the heading.
    """

    page: Callable[[Any, Viewer], str] = html
    eyebrow: str = "Evaluation in progress"
    title: str = "Nothing can be compared yet"
    lead: str = "The report appears here when the baseline and another configuration are scored."


class Growing:
    """The newest report, which one thread replaces while others show it.

    Args:
        pages: The pages.
        links: Links of the viewer.
    """

    def __init__(self, pages: Pages, links: Sequence[tuple[str, str]]) -> None:
        self._pages, self._links = pages, links
        self._lock = threading.Lock()
        self._version, self._loaded, self._asked, self._open = 0, -1, -float("inf"), 0
        self._said, self._ended = "Nothing is scored yet.", False
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        words = {"eyebrow": pages.eyebrow, "title": pages.title, "lead": pages.lead, "viewer": self._viewer(0)}
        self._page = filled("growing.html.j2", words, ("report.js",), ("report.css",))

    def _viewer(self, version: int) -> Viewer:
        return Viewer(self._links, "Live", version)

    def show(self, document: Any) -> None:
        """Show the report of a document from now on.

        Args:
            document: The comparison, or the document of the search.
        """
        page = self._pages.page(document, self._viewer(self._version + 1))
        with self._lock:
            self._version, self._page = self._version + 1, page
        self._wake()

    def say(self, text: str) -> None:
        """Tell open pages how far the work is."""
        with self._lock:
            self._said = text
        self._wake()

    def page(self) -> str:
        """Return the newest page."""
        with self._lock:
            self._asked, self._loaded = time.monotonic(), self._version
            return self._page

    async def events(self, seen: int) -> AsyncIterator[str]:
        """Yield the events of a page: `say` with a text, `page` for a newer one, which ends the stream, and `end`.

        Args:
            seen: Number of the page that the browser shows.
        """
        changed, said = asyncio.Event(), None
        waiting = (asyncio.get_running_loop(), changed)
        with self._lock:
            self._waiting.add(waiting)
            self._open += 1
        try:
            while True:
                changed.clear()
                with self._lock:
                    version, text, ended = self._version, self._said, self._ended
                if version != seen:
                    yield event("page", version)
                    return
                if text != said:
                    yield event("say", text)
                    said = text
                if ended:
                    yield event("end")
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _ALIVE)
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            with self._lock:
                self._waiting.discard(waiting)
                self._open -= 1
                self._asked = time.monotonic()

    def end(self, *, wait: bool) -> None:
        """Tell open pages that there will be no other report.

        Args:
            wait: Let a page that is open load the last report.
        """
        with self._lock:
            self._ended = True
        self._wake()
        end = time.monotonic() + _LAST
        while wait and time.monotonic() < end:
            with self._lock:
                shown = self._loaded == self._version and not self._open
                if shown or (not self._open and time.monotonic() - self._asked > _SEEN):
                    return
            time.sleep(0.05)

    def _wake(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for loop, changed in waiting:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)
