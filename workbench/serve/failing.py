"""What a request must be before it is answered, and the answers to what fails."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from workbench.ground.errors import WorkbenchError
from workbench.ground.sites import LOCAL, foreign
from workbench.serve.engine import FullError
from workbench.serve.protocol import failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from workbench.serve.metrics import Answers

BODY = 4 << 20
"""Largest body of a request, in bytes."""
ADDRESSES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
"""Addresses of a server, first those that write."""
INSTEAD = {
    "/v1/responses": "ask /v1/chat/completions, which OpenAI's SDKs call `chat.completions.create`",
    "/v1/embeddings": "this server writes texts; serve an embedding model with another server, such as vLLM or llama-server",
}
"""Address that OpenAI's interface has and this server has not -> what to use."""
SLOWEST = 60
"""Longest time in which a body arrives, in seconds."""


class RefusedError(WorkbenchError):
    """A request that is not answered.

    Args:
        status: Status of the answer.
        kind: Kind of the error, as OpenAI's clients know it.
        message: What is wrong.
        field: The field that is wrong.
    """

    def __init__(self, status: int, kind: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.field = status, kind, field


class Guarded:
    """Passes on the requests that may be answered.

    Args:
        app: Answers them.
        key: Secret that requests must name, which no other site's page knows; None: a page is known by its headers.
        answers: Counts the answers.
    """

    def __init__(self, app: ASGIApp, key: str | None, answers: Answers) -> None:
        self._app, self._key, self._answers = app, key, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        hosts = LOCAL if self._key is None else None
        wrong = foreign(Headers(scope=scope), scope["method"], hosts) if scope["type"] == "http" else None
        app = self._app
        if wrong is not None:
            told = f"{wrong[1]}; a server with --key answers whoever knows the key" if wrong[0] == 403 else wrong[1]
            app = JSONResponse(failure(told, "invalid_request_error"), wrong[0])
        begun, path = time.monotonic(), scope.get("path", "")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answers.statuses[path if path in ADDRESSES else "other", str(message["status"])] += 1
            await send(message)

        try:
            await app(scope, receive, counted)
        finally:
            if path in ADDRESSES[:2]:
                self._answers.seconds.add(time.monotonic() - begun)


def checked_key(key: str | None, http: HttpRequest) -> None:
    """Raise RefusedError if a request does not name the key."""
    given = http.headers.get("authorization", "")
    if key is not None and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise RefusedError(401, "authentication_error", "expected the header `Authorization: Bearer KEY` with this server's key")


async def body_of(http: HttpRequest) -> bytes:
    """Return the body of a request, and stop reading when it is too large or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST):
            async for part in http.stream():
                body += part
                if len(body) > BODY:
                    raise RefusedError(413, "invalid_request_error", f"the body has more than {BODY >> 20} MB")
    except TimeoutError:
        raise RefusedError(408, "invalid_request_error", f"the body did not arrive within {SLOWEST} seconds") from None
    except ClientDisconnect:
        raise gone() from None
    return bytes(body)


def gone() -> RefusedError:
    """Return the error of a request whose client has left; nobody reads the answer."""
    return RefusedError(499, "invalid_request_error", "the client has left")


def failures() -> Mapping[Any, Any]:
    """Return kind of error -> function that answers with it."""
    known = {ValidationError: _invalid, RefusedError: _refused, FullError: _full, WorkbenchError: _failed, TimeoutError: _late}
    return {**known, HTTPException: _missing, Exception: _failed}


def _invalid(_http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    found = error.errors(include_url=False, include_context=False)
    # Of the forms that a field may have, the one that was followed furthest is the one that was meant.
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = max(same, key=lambda one: (len(one["loc"]), one["type"] != "string_type"))
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained-", "str")))
    told = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        told = "this server does not know the field, which would have no effect: leave it out"
    return JSONResponse(failure(f"{place}: {told}".lstrip(": "), "invalid_request_error", place or None), 400)


def _refused(_http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(failure(error.message, error.kind, error.field), error.status)


def _missing(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = INSTEAD.get(http.url.path, f"this server has {', '.join(ADDRESSES)}")
    told = f"no address {http.url.path}: {found}" if error.status_code == 404 else error.detail
    return JSONResponse(failure(told, "invalid_request_error"), error.status_code, error.headers)


def _full(_http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, WorkbenchError)
    return JSONResponse(failure(error.message, "server_error"), 503, {"Retry-After": "1"})


def _failed(_http: HttpRequest, error: Exception) -> Response:
    told = error.message if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
    return JSONResponse(failure(told, "server_error"), 500)


def _late(_http: HttpRequest, _error: Exception) -> Response:
    return JSONResponse(failure("the text took too long", "timeout"), 504)
