"""The server of the viewer: uvicorn in a thread, on 127.0.0.1, behind the guard."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import uvicorn

from workbench.ground.errors import UsageError
from workbench.view.guard import ADDRESS, Guard

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class Served:
    """Serves an application until the block ends.

    Args:
        app: Answers the requests.
        port: Port to listen on; 0 for a free one.

    Attributes:
        url: The address to open, with its token.

    Raises:
        UsageError: If the port cannot be used.
    """

    def __init__(self, app: ASGIApp, port: int = 0) -> None:
        self._socket = bound(port)
        guard = Guard(app, int(self._socket.getsockname()[1]))
        self.url = guard.url
        self._server = uvicorn.Server(
            uvicorn.Config(
                guard,
                log_config=None,
                log_level="critical",
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Served:
        self._socket.listen(128)  # requests wait from here on
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def wait(self) -> None:
        """Serve until the user interrupts."""
        while self._thread.is_alive():
            self._thread.join(1)


def bound(port: int) -> socket.socket:
    """Return a socket on a port of this machine, 0 for a free one.

    Raises:
        UsageError: If the port cannot be used.
    """
    opened = socket.socket()
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise UsageError(
            f"--port {port}: cannot listen on {ADDRESS}:{port}: {error}", "Name another port, or none for a free one."
        ) from error
    return opened
