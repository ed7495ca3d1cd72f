"""A router before a LoRA server: each request goes on with the name, or the scales, of the adapter that the router chooses for it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.http import StatusError, ask
from workbench.models.prompts import encode_text
from workbench.route.deciding.router import BASE
from workbench.serve import protocol
from workbench.serve.app import headers_of
from workbench.serve.engine import Piece
from workbench.serve.failing import Guarded, RefusedError, body_of, checked_key, failures
from workbench.serve.metrics import KIND, Answers
from workbench.ship.expected import KEY
from workbench.ship.servers import request_fields, request_name

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from workbench.route.mixing.live import Routing

SERVERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""Who owns a server's models, as it says -> its name here."""
_START = "Start it with the script that `workbench export` writes: sh DIR/serve.sh"


@dataclass(frozen=True)
class Upstream:
    """A server with the bricks as adapters.

    Attributes:
        url: Its address, without /v1.
        server: vllm, sglang or llama.cpp.
        base: Its name for the base.
    """

    url: str
    server: str
    base: str

    @classmethod
    def find(cls, url: str, bricks: Sequence[str]) -> Upstream:
        """Return what answers at an address.

        Raises:
            UsageError: If it is no server of a known kind, or it has other adapters than the bricks.
            WorkbenchError: If it cannot be reached.
        """
        url = url.rstrip("/").removesuffix("/v1")
        listed = _ask(f"{url}/v1/models")
        rows = [row for row in listed.get("data", []) if isinstance(row, dict)] if isinstance(listed, dict) else []
        server = next((SERVERS[owner] for row in rows if (owner := str(row.get("owned_by"))) in SERVERS), None)
        if server is None:
            raise UsageError(f"--to {url}: expected vLLM, SGLang or llama-server, whose /v1/models names it", _START)
        names = [str(row.get("id")) for row in rows]
        if server == "llama.cpp":
            found = _ask(f"{url}/lora-adapters")
            adapters = [PurePath(str(row["path"])).stem for row in sorted(found, key=lambda row: row["id"])]
            fits, base = adapters == list(bricks), names[0]
        else:
            base = next((name for name in names if name.rpartition(":")[2] not in bricks), names[0])
            adapters = [name for name in names if name != base]
            fits = all(request_name(server, base, brick) in names for brick in bricks)
        if not fits:
            order = ", in this order" if server == "llama.cpp" else ""
            raise UsageError(
                f"--to {url}: expected the adapters {', '.join(bricks)}{order}; the server has {', '.join(adapters) or 'none'}",
                "Export the configuration again, and start the server with its serve.sh.",
            )
        return cls(url, server, base)

    def fields(self, brick: str, bricks: Sequence[str]) -> dict[str, object]:
        """Return the fields of a request that a brick, or the base, answers."""
        acting = None if brick == BASE else brick
        name = self.base if acting is None else request_name(self.server, self.base, acting)
        return {"model": name, **request_fields(self.server, bricks).get(acting, {})}


def _ask(url: str) -> Any:
    try:
        return ask(url, _START, key=os.environ.get(KEY), seconds=30)
    except StatusError as error:
        raise UsageError(f"{error.message}", _START) from None


class Front:
    """Sends requests on to a server, each with the adapter that the router chooses.

    Args:
        name: Name of the configuration, under which clients ask for the router's choice.
        routing: The routing of the live base.
        tokenizer: Its tokenizer.
        upstream: The server.
        key: Secret that requests must name; None: none.
        seconds: Longest time between two parts of an answer.
    """

    def __init__(
        self, name: str, routing: Routing, tokenizer: Any, upstream: Upstream, key: str | None = None, seconds: float = 600.0
    ) -> None:
        self.name, self.routing, self.upstream, self.key = name, routing, upstream, key
        self.acted: Counter[str] = Counter()
        self.answers = Answers()
        self._tokenizer, self._one = tokenizer, Lock()  # a live model decides for one request at a time
        given = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        self._client = httpx.AsyncClient(base_url=upstream.url, timeout=seconds, headers=headers, follow_redirects=False)

    async def respond(self, http: HttpRequest) -> Response:
        """Send a request on, and pass the answer back as it comes."""
        checked_key(self.key, http)
        try:
            body = jsondoc.parse(await body_of(http), "the request")
            chosen = await asyncio.to_thread(self.choose, body, chat=http.url.path.endswith("chat/completions"))
        except RefusedError:
            raise
        except WorkbenchError as error:
            raise RefusedError(400, "invalid_request_error", error.message) from error
        sent = json.dumps({**body, **self.upstream.fields(chosen.acted or BASE, self.routing.bricks)}).encode()
        begun = time.monotonic()
        request = self._client.build_request(
            "POST", http.url.path, content=sent, headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise RefusedError(502, "server_error", f"the server at {self.upstream.url} does not answer: {error}") from error
        self.acted[chosen.acted or BASE] += 1
        self.answers.first.add(time.monotonic() - begun)
        kind = answer.headers.get("content-type", "application/json")
        parts = _parts(answer)
        return StreamingResponse(parts, answer.status_code, headers_of(chosen), kind, BackgroundTask(answer.aclose))

    def choose(self, body: Any, *, chat: bool) -> Piece:
        """Return which brick answers a request, and how certain the router is.

        Raises:
            RefusedError: If the request has no prompt, several that different bricks should answer, or a model that is not here.
        """
        if not isinstance(body, dict):
            raise RefusedError(400, "invalid_request_error", "expected a JSON object")
        model, bricks = body.get("model"), self.routing.bricks
        if model in bricks or model == BASE:
            return Piece(acted=str(model))
        if model != self.name:
            known = ", ".join((self.name, *bricks, BASE))
            raise RefusedError(404, "invalid_request_error", f"no model '{model}': this server has {known}", "model")
        try:
            prompts = [self._chat(body)] if chat else self._prompts(body["prompt"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            field = "messages" if chat else "prompt"
            raise RefusedError(400, "invalid_request_error", f"'{field}' cannot be read: {error}", field) from error
        if not prompts or not all(prompts):
            raise RefusedError(400, "invalid_request_error", "the prompt has no tokens", "prompt")
        if (count := sum(map(len, prompts))) > protocol.MOST_ROUTED:
            told = f"the router reads {protocol.MOST_ROUTED} tokens of a request; the prompts have {count}"
            raise RefusedError(400, "invalid_request_error", told, "prompt")
        with self._one:
            made = self.routing.decide(prompts)
        names = [self.routing.label(row) for row in made.weights]
        if len(set(names)) > 1:
            raise RefusedError(
                400, "invalid_request_error", "different bricks answer these prompts: send each by itself", "prompt"
            )
        return Piece(acted=names[0], confidence=float(made.confidence[0]))

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Return the tokens of a completion's prompts, at most MOST_CHOICES."""
        listed = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        if len(listed) > protocol.MOST_CHOICES:
            raise ValueError(f"{len(listed)} prompts; a request has at most {protocol.MOST_CHOICES}")
        found = [encode_text(self._tokenizer, one) if isinstance(one, str) else [int(token) for token in one] for one in listed]
        if any(not 0 <= token < len(self._tokenizer) for tokens in found for token in tokens):
            raise ValueError(f"a token is none of 0 to {len(self._tokenizer) - 1}")
        return found

    def _chat(self, body: Any) -> list[int]:
        """Return the tokens of a conversation under the tokenizer's chat template."""
        more = {"add_generation_prompt": body.get("add_generation_prompt", True), "tools": body.get("tools")}
        more["continue_final_message"] = body.get("continue_final_message", False)
        return list(self._tokenizer.apply_chat_template(body["messages"], tokenize=True, return_dict=False, **more))

    async def health(self, _http: HttpRequest) -> Response:
        """Say whether the server is there."""
        try:
            status = (await self._client.get("/health", timeout=10)).status_code
        except httpx.HTTPError:
            status = 502
        return PlainTextResponse("ok\n") if status == 200 else PlainTextResponse("the server behind does not answer\n", 503)

    def models(self, http: HttpRequest) -> Response:
        """List the names that a request can have."""
        checked_key(self.key, http)
        return JSONResponse(protocol.models((self.name, *self.routing.bricks, BASE)))

    def metrics(self, http: HttpRequest) -> Response:
        """Return what was answered, and how often each brick was chosen."""
        checked_key(self.key, http)
        return PlainTextResponse(self.answers.text(self.acted), media_type=KIND)


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Yield an answer as it comes; one that breaks off ends."""
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        yield f"data: {json.dumps(protocol.failure(str(error), 'server_error'))}\n\n".encode()


def application(front: Front) -> ASGIApp:
    """Return the application that stands before a server."""
    routes = [
        Route("/v1/completions", front.respond, methods=["POST"]),
        Route("/v1/chat/completions", front.respond, methods=["POST"]),
        Route("/v1/models", front.models),
        Route("/health", front.health),
        Route("/metrics", front.metrics),
    ]
    return Guarded(Starlette(routes=routes, exception_handlers=failures()), front.key, front.answers)


def unrouted(name: str) -> WorkbenchError:
    """Return the error for a configuration without a router."""
    return UsageError(
        f"--to: {name} has no router that could choose an adapter of the server",
        "Name a routed configuration, or ask the server itself.",
    )
