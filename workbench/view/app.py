"""The addresses of the viewer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from workbench.errors import WorkbenchError
from workbench.view.growing import Growing, event
from workbench.view.guard import LONGEST_BODY, page
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

    def wrong(_request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = MissingError("there is nothing here") if error.status_code == 404 else WorkbenchError(error.detail)
        assert isinstance(error, WorkbenchError)
        return page(site.error(error), 404 if isinstance(error, MissingError) else 422)

    def shown(make: Callable[[Request], str]) -> Callable[[Request], Response]:
        """Return the endpoint of a page, which runs in a thread."""
        return lambda request: page(make(request))

    def home(_request: Request) -> Response:
        return page(site.home()) if growing is None else RedirectResponse("/growing", 303)

    def live(_request: Request) -> Response:
        return page(site.live()) if growing is None else RedirectResponse("/growing", 303)

    def query(request: Request, name: str) -> str | None:
        return request.query_params.get(name) or None

    def report(request: Request) -> str:
        asked = request.query_params
        beside = (
            [one for one in asked.getlist("with") if one] if "with" in asked else None
        )  # the form's own has one that is empty
        return site.report(request.path_params["folder"], asked.getlist("name"), query(request, "baseline"), beside)

    routes = [
        Route("/", home),
        Route("/recipes", shown(lambda _: site.recipes())),
        Route("/recipes/{file}", shown(lambda r: site.recipe(r.path_params["file"], query(r, "against")))),
        Route("/recipes/{file}/plan", _part(lambda r: site.plan(r.path_params["file"]))),
        Route("/runs", shown(lambda _: site.runs())),
        Route("/runs/{name}", shown(lambda r: site.run(r.path_params["name"]))),
        Route("/scores", shown(lambda _: site.scores())),
        Route("/scores/{folder}", shown(report)),
        Route("/searches", shown(lambda _: site.searches())),
        Route("/searches/{name}", shown(lambda r: site.search(r.path_params["name"]))),
        Route("/searches/{name}/events", lambda r: _stream(_changes(lambda: site.candidates(r.path_params["name"])))),
        Route("/live", live),
        Route("/live/events", lambda _: _stream(_changes(site.progress))),
    ]
    if growing is not None:
        routes += [Route("/growing", shown(lambda _: growing.page())), Route("/growing/events", _watch(growing))]
    if talk is not None:
        routes += [Route("/chat", shown(lambda _: site.chat())), Route("/chat", _ask(talk), methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={WorkbenchError: wrong, HTTPException: wrong})


def _part(make: Callable[[Request], str]) -> Callable[[Request], Response]:
    """Return the endpoint of a part of a page, which says errors itself."""

    def answer(request: Request) -> Response:
        try:
            return Response(make(request), media_type="text/html; charset=utf-8")
        except WorkbenchError as error:
            return PlainTextResponse("\n".join(filter(None, (error.message, error.hint))), 422)

    return answer


def _stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")


async def _changes(make: Callable[[], str]) -> AsyncIterator[str]:
    """Yield a part of a page whenever it has changed."""
    last = None
    while True:
        try:
            text = await run_in_threadpool(make)
        except WorkbenchError as error:
            yield event("say", error.message)
            return
        yield event("part", text) if text != last else ": still here\n\n"
        last = text
        await asyncio.sleep(_PAUSE)


def _watch(growing: Growing) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        seen = request.query_params.get("seen", "")
        return _stream(growing.events(int(seen) if seen.isdecimal() and len(seen) < 10 else -1))

    return answer


def _ask(talk: Talk) -> Callable[[Request], object]:
    async def answer(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_BODY:
                return PlainTextResponse("The question is too long.", 413)
        try:
            asked = Asked.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            return PlainTextResponse(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 422)
        return _stream(talk.answers(asked))

    return answer
