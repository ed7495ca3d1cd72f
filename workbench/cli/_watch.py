"""The growing report of `eval --watch`: what the page shows while configurations are scored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.subjects import Opened
from workbench.cli._output import out, time_left
from workbench.cli._subjects import compare_scores
from workbench.errors import UsageError, WorkbenchError
from workbench.events import Events

if TYPE_CHECKING:
    from workbench.report.watch import Watched

WatchOpt = Annotated[
    bool, typer.Option("--watch", help="Show the growing report at an address of this machine until the command ends.")
]
PortOpt = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port of --watch; default: a free one.")
]
_PAUSE = 2.0
"""Smallest number of seconds between two reports."""


def check_watch(watch: bool, port: int | None, silent: bool) -> None:
    """Check the options before any work.

    Args:
        watch: Value of `--watch`.
        port: Value of `--port`.
        silent: True if the command prints no messages, and so not the address either.

    Raises:
        UsageError: If one option lacks the other.
    """
    if port is not None and not watch:
        raise UsageError(f"--port {port}: nothing is shown without --watch", f"--watch --port {port}")
    if watch and silent and not port:
        raise UsageError("--watch: with --quiet or --json, the address of a free port is not printed", "--watch --port 8765")


@contextmanager
def watching(opened: Opened, against: str | None, watch: bool, port: int | None) -> Iterator[Events]:
    """Yield the receiver of progress events: the terminal, and with `--watch` the page as well.

    Args:
        opened: What is scored.
        against: Name of the baseline; None if the suite decides.
        watch: Value of `--watch`.
        port: Value of `--port`.
    """
    if not watch:
        yield out.event
        return
    from workbench.report.watch import Watched

    with Watched(port or 0) as watched:
        out.say(f"the report grows at {watched.url} until the command ends")
        page = _Page(watched, opened, against)
        yield page.event
        page.show()


class _Page:
    """Passes events on to the terminal, and shows new scores on the page."""

    def __init__(self, watched: Watched, opened: Opened, against: str | None) -> None:
        self.watched, self.opened, self.against = watched, opened, against
        self._shown = -_PAUSE

    def event(self, event: dict[str, Any]) -> None:
        """Take a progress event."""
        out.event(event)
        whole = event.get("overall")
        if whole:
            now = f"; now {event['configuration']}: {event['text']}" if event.get("text") else ""
            self.watched.say(
                f"{whole['finished']} of {whole['of']} configurations are scored, {100 * whole['share']:.0f} % of the items"
                f"{time_left(whole)}{now}."
            )
        done = "scored" in event or (event.get("stage") == "score" and "configuration" not in event)
        if done and time.monotonic() - self._shown >= _PAUSE:
            self.show()

    def show(self) -> None:
        """Show the report of all scores that are stored now; nothing if they cannot be compared yet."""
        from workbench.evaluate.scoring import stored

        opened = self.opened
        try:
            scores, missing = stored(opened.entries, opened.plans, opened.store, self.against)
            if len({s.configuration.name for s in scores}) < 2:
                return
            document = compare_scores(opened.store, scores, self.against, opened.project, opened.sweeps).document()
        except WorkbenchError as error:  # the evaluation goes on; at its end the same comparison is made again
            self.watched.say(f"The scores so far cannot be compared: {error.message.splitlines()[0]}")
            return
        waiting = [f"Not scored yet: {', '.join(missing)}."] if missing else []
        self.watched.show({**document, "warnings": [*document["warnings"], *waiting]})
        self._shown = time.monotonic()
