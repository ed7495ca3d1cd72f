"""A page that grows: the report of an evaluation or a search of this process, which open browsers load again when there is a newer one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import escape

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.search.result import SearchState
    from workbench.view.pages import Site, Work

_PAUSE = 0.2
"""Seconds between two looks at what an open page shows."""
_SEEN = 10.0
"""Seconds since its last request for which a page counts as open."""
_LAST = 5.0
"""Largest number of seconds that the end of the command waits for an open page to load the last report and hear of the end."""


def event(name: str, data: object = "") -> str:
    """Return a server-sent event with data as JSON."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def changes(look: Callable[[], tuple[str, object]], pause: float) -> AsyncIterator[str]:
    """Yield an event whenever it is another one; a line between them notices a browser that is gone.

    Args:
        look: Returns name and data of the event now: `part` with what the page shows, or, as the last one, `page` or `end`.
        pause: Seconds between two looks.
    """
    last = None
    while last is None or last[0] == "part":
        found = await asyncio.to_thread(look)
        yield event(*found) if found != last else ": still here\n\n"
        last = found
        await asyncio.sleep(pause)


class Growing:
    """The newest report, which one thread replaces while others show it.

    Args:
        site: The pages of the viewer.
        work: What this process does.
    """

    def __init__(self, site: Site, work: Work) -> None:
        self._site, self._work = site, work
        self._said, self._ended = "Nothing is scored yet.", False
        self._told, self._asked, self._open = False, -float("inf"), 0
        self._newest = (0, site.growing(work))

    def show(self, document: Comparison | SearchState) -> None:
        """Show the report of a comparison or a search from now on."""
        version = self._newest[0] + 1
        self._newest = version, self._site.growing(self._work, document, version)

    def say(self, text: str) -> None:
        """Tell open pages how far the work is."""
        self._said = text

    def page(self) -> str:
        """Return the newest page."""
        self._asked = time.monotonic()
        return self._newest[1]

    async def events(self, seen: int) -> AsyncIterator[str]:
        """Yield the events of a page: how far the work is, a `page` that is newer, and the end of the command.

        Args:
            seen: Number of the page that the browser shows.
        """
        self._open += 1
        try:
            async for text in changes(partial(self._now, seen), _PAUSE):
                yield text
        finally:
            self._open -= 1
            self._asked = time.monotonic()

    def _now(self, seen: int) -> tuple[str, object]:
        ended = self._ended  # read first: what is shown before the end is on the page
        if (version := self._newest[0]) != seen:
            return "page", version
        self._told |= ended
        return ("end", "") if ended else ("part", str(escape(self._said)))

    def end(self, *, wait: bool) -> None:
        """Tell open pages that there will be no other report.

        Args:
            wait: Let a page that is open load the last report.
        """
        self._ended = True
        end = time.monotonic() + _LAST
        while wait and time.monotonic() < end:
            if not self._open and (self._told or time.monotonic() - self._asked > _SEEN):
                return
            time.sleep(0.05)
