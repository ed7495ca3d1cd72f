"""The server of a configuration: uvicorn in the main thread, whose signals end it after the texts that are being written."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from workbench.ground.errors import UsageError
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import longest_row
from workbench.run.routers import RECORD, SavedRouter, factors_of
from workbench.serve.app import Served
from workbench.serve.engine import Engine

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import ASGIApp

    from workbench.route.mixing.live import Routing
    from workbench.run.opened import NamedModel

PATIENCE = 30
"""Seconds that texts have to end when the server is stopped."""
LONGEST = 1 << 17
"""Largest number of tokens of a text, of a model without a number of positions."""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on an address, before the model is loaded.

    Raises:
        UsageError: If the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}", "Name another --port, or 0 for a free one.") from error
    with opened:
        yield opened


class RouterFiles:
    """The files of a served router, which `route add` and `route rm` change.

    Args:
        path: Their directory.
        routing: The routing of the live model.
    """

    def __init__(self, path: Path, routing: Routing) -> None:
        self._path, self._routing = path, routing
        self._stamp = self._now()

    def _now(self) -> tuple[int, int]:
        found = (self._path / RECORD).stat()
        return found.st_mtime_ns, found.st_ino

    def changed(self) -> bool:
        """Return whether routing.json is another one."""
        try:
            return self._now() != self._stamp
        except OSError:  # the directory is gone, or is being replaced: the bricks in memory go on
            return False

    def renew(self) -> None:
        """Let the model choose among the bricks that the files name now."""
        self._stamp = self._now()
        saved = SavedRouter(self._path)
        self._routing.renew(saved.router, factors_of(saved.at().adapters))


def served(named: NamedModel, model: Any, key: str | None = None, seconds: float = 600.0) -> Served:
    """Return what is served, with its engine, which begins to wait for requests."""
    resolved, routing = named.resolved, getattr(model, "routing", None)
    files = RouterFiles(resolved.router.path, routing) if resolved.router and routing is not None else None
    engine = Engine(model, load_tokenizer(resolved.tokenizer_path), source=files)
    return Served(named.name, engine, longest_row(model.config.to_dict(), LONGEST), key, seconds, int(time.time()))


class _Server(uvicorn.Server):
    """A server that a signal ends, and which does not raise the signal once more at its end: the texts come first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def before(named: NamedModel, model: Any, url: str, key: str | None, seconds: float) -> ASGIApp:
    """Return the application that chooses adapters for a server, whose texts it passes on.

    Raises:
        UsageError: If the configuration has no router, or the server other adapters.
        WorkbenchError: If the server cannot be reached.
    """
    from workbench.serve.proxy import Front, Upstream, application, unrouted

    routing = getattr(model, "routing", None)
    if routing is None:
        raise unrouted(named.name)
    upstream = Upstream.find(url, routing.bricks)
    return application(Front(named.name, routing, load_tokenizer(named.resolved.tokenizer_path), upstream, key, seconds))


def run(app: ASGIApp, opened: socket.socket, engine: Engine | None, say: Callable[[str], None]) -> None:
    """Serve until a signal; then take no more requests, and let the texts end.

    Args:
        app: The application.
        opened: Where it listens.
        engine: Writes the texts; None if another server does.
        say: Receives lines for the user.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=PATIENCE,
    )
    _Server(config).run(sockets=[opened])
    say("the server ends after the texts that are being written")
    if engine and not engine.close(PATIENCE):
        say(f"texts were cut off after {PATIENCE} seconds")
