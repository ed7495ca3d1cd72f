"""A server for one page that grows: the report of an evaluation or a search in progress, on this machine only.

It listens on 127.0.0.1 and answers requests that are addressed to that place only, so that no page of another site can read it through
a name that points here (DNS rebinding). It serves what it was given, reads no file, and changes nothing.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from workbench.compare.comparison import Comparison
from workbench.errors import UsageError
from workbench.report.page import filled, html

ADDRESS = "127.0.0.1"
_SEEN = 10.0
"""Seconds since its last request for which a page counts as open."""
_LAST = 5.0
"""Largest number of seconds that the end of the command waits for an open page to load the last report."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def comparison_page(comparison: Comparison, watched: int) -> str:
    """Return the page of a comparison.

    Args:
        comparison: The comparison.
        watched: Number of the page, which the page compares with the server's.
    """
    return html(comparison, watched=watched)


@dataclass(frozen=True)
class Pages:
    """The pages of one kind of work.

    Attributes:
        page: Function of the comparison or the search's document and the page's number that returns the page.
        eyebrow: The kind of work, above the heading of the page that is shown before there is a report.
        title: Heading of that page.
        lead: Sentence below the heading.
    """

    page: Callable[[Any, int], str] = comparison_page
    eyebrow: str = "Evaluation in progress"
    title: str = "Nothing can be compared yet"
    lead: str = "The report appears here when the baseline and another configuration are scored."


class Watched:
    """Serves the newest report until the block ends.

    Args:
        port: Port to listen on; 0 for a free one.
        pages: The pages; default: those of an evaluation.

    Raises:
        UsageError: If the port cannot be used.
    """

    def __init__(self, port: int = 0, pages: Pages = Pages()) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._version, self._loaded, self._asked = 0, -1, -float("inf")
        self._text, self._ended = "Nothing is scored yet.", False
        words = {"eyebrow": pages.eyebrow, "title": pages.title, "lead": pages.lead, "watched": 0}
        self._page = filled("watch.html.j2", words, ("report.js", "watch.js"), ("report.css",)).encode()
        try:
            self._server = ThreadingHTTPServer((ADDRESS, port), type("Handler", (_Handler,), {"source": self}))
        except (OSError, OverflowError) as error:
            raise _refused(port, error) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://{ADDRESS}:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._ended = True
        if kind is None:
            self._wait()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def show(self, document: Any) -> None:
        """Serve the report of a document from now on.

        Args:
            document: The comparison, or the document of the search.
        """
        page = self._pages.page(document, self._version + 1).encode()
        with self._lock:
            self._version, self._page = self._version + 1, page

    def say(self, text: str) -> None:
        """Tell open pages how far the work is."""
        with self._lock:
            self._text = text

    def state(self) -> dict[str, Any]:
        """Return what pages ask for again and again: the report's version, how far the work is, and whether it has ended."""
        with self._lock:
            self._asked = time.monotonic()
            return {"version": self._version, "text": self._text, "ended": self._ended}

    def page(self) -> bytes:
        """Return the newest page."""
        with self._lock:
            self._asked, self._loaded = time.monotonic(), self._version
            return self._page

    def _wait(self) -> None:
        """Let a page that is open load the last report."""
        end = time.monotonic() + _LAST
        while time.monotonic() < end:
            with self._lock:
                if self._loaded == self._version or time.monotonic() - self._asked > _SEEN:
                    return
            time.sleep(0.05)


def check_port(port: int) -> None:
    """Check that a server can listen on a port now.

    Raises:
        UsageError: If the port cannot be used.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise _refused(port, error) from error


def _refused(port: int, error: Exception) -> UsageError:
    return UsageError(f"--port {port}: cannot listen on {ADDRESS}:{port}: {error}", "Name another port, or none for a free one.")


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of the page and of its state, for requests to this machine only."""

    source: Watched
    server_version, sys_version = "workbench", ""
    timeout = 20

    def do_GET(self) -> None:
        """Answer with the page or its state; the base class refuses every other method."""
        hosts = {f"{name}:{self.source.port}" for name in (ADDRESS, "localhost")}
        if self.headers.get("Host", "").lower() not in hosts:
            self._send(403, b"This report is shown to this machine only.\n", "text/plain; charset=utf-8")
        elif self.path == "/":
            self._send(200, self.source.page(), "text/html; charset=utf-8")
        elif self.path == "/state":
            self._send(200, json.dumps(self.source.state()).encode(), "application/json")
        else:
            self._send(404, b"There is nothing here.\n", "text/plain; charset=utf-8")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the progress."""
