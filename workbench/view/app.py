"""The addresses of the viewer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from workbench.ground.errors import UsageError, WorkbenchError
from workbench.view.growing import Growing, changes
from workbench.view.guard import file_page, page
from workbench.view.pages import MissingError, Site
from workbench.view.talk import Asked, Talk

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_PAUSE = 1.0
"""Seconds between two looks at what is in progress, while a page shows it."""


def application(site: Site, *, talk: Talk | None = None, growing: Growing | None = None) -> ASGIApp:
    """Return the application of the viewer.

    Args:
        site: The pages of the project.
        talk: The models of the chat page; None for a viewer without it.
        growing: The page of an evaluation or search of this process, which is then shown first.
    """

    def wrong(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = MissingError("there is nothing here") if error.status_code == 404 else WorkbenchError(error.detail)
        assert isinstance(error, WorkbenchError)
        status = 404 if isinstance(error, MissingError) else 422
        if "text/html" in request.headers.get("accept", ""):
            return page(site.error(error), status)
        return PlainTextResponse("\n".join(filter(None, (error.message, error.hint))), status)  # a script asks

    def shown(make: Callable[..., str], *asked: str) -> Callable[[Request], Response]:
        """Return the endpoint of a page, which gets the names in the address and values of its query, and runs in a thread."""
        return lambda request: page(make(**request.path_params, **{name: request.query_params.getlist(name) for name in asked}))

    async def ask(request: Request) -> Response:
        assert talk
        try:
            return _stream(talk.answers(Asked.model_validate_json(await request.body())))
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    routes = [
        *(Route(path, shown(partial(site.place, name))) for name, path in site.links if talk or name != "Chat"),
        Route("/recipes/{file}", shown(site.recipe, "against")),
        Route("/recipes/{file}/plan", shown(site.plan)),
        Route("/runs/{name}", shown(site.run)),
        Route("/scores/{folder}", shown(site.report, "name", "baseline", "beside")),
        Route("/neurons/{model}/{file}", lambda request: file_page(site.neurons(**request.path_params))),
        Route("/searches/{name}", shown(site.search)),
        Route("/searches/{name}/events", lambda request: _stream(_parts(partial(site.candidates, **request.path_params)))),
        Route("/live/events", lambda _: _stream(_parts(site.progress))),
    ]
    if growing is not None:
        grown = Route("/growing/{seen:int}", lambda request: _stream(growing.events(**request.path_params)))
        routes = [*(Route(path, shown(growing.page)) for path in ("/", "/live")), grown, *routes]
    if talk is not None:
        routes.append(Route("/chat", ask, methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={WorkbenchError: wrong, HTTPException: wrong})


def _stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")


def _parts(make: Callable[[], str]) -> AsyncIterator[str]:
    """Return the events of a part of a page; an error ends them."""

    def now() -> tuple[str, object]:
        try:
            return "part", make()
        except WorkbenchError as error:
            return "end", error.message

    return changes(now, _PAUSE)
