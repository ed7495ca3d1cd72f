"""The server of a configuration: uvicorn in the main thread, whose signals end it after the texts that are being written."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from workbench.errors import UsageError
from workbench.models.texts import longest_row
from workbench.serve.app import Served
from workbench.serve.engine import Engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp

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


def served(name: str, model: Any, tokenizer: Any, key: str | None = None, seconds: float = 600.0) -> Served:
    """Return what is served, with its engine, which begins to wait for requests."""
    longest = longest_row(model.config.to_dict(), LONGEST)
    return Served(name, Engine(model, tokenizer), longest, key, seconds, int(time.time()))


def run(app: ASGIApp, opened: socket.socket, engine: Engine, say: Callable[[str], None]) -> None:
    """Serve until a signal; then take no more requests, and let the texts end.

    Args:
        app: The application.
        opened: Where it listens.
        engine: Writes the texts.
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
    uvicorn.Server(config).run(sockets=[opened])
    say("the server ends after the texts that are being written")
    if not engine.close(PATIENCE):
        say(f"texts were cut off after {PATIENCE} seconds")
