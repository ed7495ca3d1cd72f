"""The addresses of a served configuration."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import encode_text
from workbench.route.deciding.router import BASE
from workbench.serve import protocol, tools
from workbench.serve.engine import COUNTED, ROWS, Engine, Piece, Request
from workbench.serve.failing import BODY, Guarded, RefusedError, body_of, checked_key, failures, gone
from workbench.serve.forms import Form, FormError, form_of
from workbench.serve.metrics import KIND, Answers, family
from workbench.serve.protocol import Asked, ChatAsked, Collected, CompletionAsked
from workbench.serve.writing import Sampling

if TYPE_CHECKING:
    from starlette.types import ASGIApp


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        name: Name of the configuration.
        engine: Writes the texts.
        longest: Largest number of tokens of a prompt with its text.
        key: Secret that requests must name; None: none.
        seconds: Longest time for a request.
        created: When the server began.
        answers: What was answered.
    """

    name: str
    engine: Engine
    longest: int
    key: str | None = None
    seconds: float = 600.0
    created: int = 0
    answers: Answers = field(default_factory=Answers)

    @property
    def prompt_tokens(self) -> int:
        """Largest number of tokens of a request's prompts, each counted once for each of its texts: those of a full batch."""
        return ROWS * self.longest

    @property
    def bricks(self) -> tuple[str, ...]:
        """Bricks that a request can name as its model."""
        routing = getattr(self.engine.model, "routing", None)
        return () if routing is None else tuple(routing.bricks)

    def brick_of(self, model: str) -> str | None:
        """Return the brick that a request names, "base", or None if the router chooses."""
        if model == self.name:
            return None
        if model in self.bricks or (model == BASE and self.bricks):
            return model
        known = ", ".join((self.name, *self.bricks, *([BASE] if self.bricks else [])))
        raise RefusedError(404, "invalid_request_error", f"no model '{model}': this server has {known}", "model")


class Endpoint:
    """Answers one kind of requests.

    Args:
        served: What is served.
        asked: The form of a request.
    """

    asked: type[Asked]
    kind: str

    def __init__(self, served: Served) -> None:
        self.served = served

    async def respond(self, http: HttpRequest) -> Response:
        """Answer a request."""
        checked_key(self.served.key, http)
        begun = time.monotonic()
        asked = self.asked.model_validate_json(await body_of(http))
        brick = self.served.brick_of(asked.model)
        prompts = [tokens for tokens in await asyncio.to_thread(self.prompts, asked) for _ in range(asked.n)]
        samplings = [self.sampling(asked, number, tokens) for number, tokens in enumerate(prompts)]
        if (count := sum(map(len, prompts))) > self.served.prompt_tokens:
            told = f"the prompts have {count} tokens, counted once for each of n = {asked.n}; a request has at most"
            raise RefusedError(
                400, "invalid_request_error", f"{told} {self.served.prompt_tokens}: send several requests", "prompt"
            )
        form = await asyncio.to_thread(self.form, asked)
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), threading.Event()

        def take(number: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        watch = asyncio.create_task(_watch(http, left, queue))
        try:
            for number, (tokens, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                own = form and form.again()
                self.served.engine.submit(Request(tokens, sampling, partial(take, number), brick, left.is_set, form=own))
            head = {"id": f"{self.kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
            pieces = _pieces(queue, len(prompts), self.served.seconds)
            first = await anext(pieces)
            self.served.answers.first.add(time.monotonic() - begun)
            headers = headers_of(first[1])
            if asked.stream:
                events = self.events(asked, prompts, first, pieces, head, left)
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            found = [Collected(prompt=tokens) for tokens in prompts]
            found[first[0]].add(first[1])
            async for number, piece in pieces:
                found[number].add(piece)
        except BaseException:
            left.set()
            raise
        finally:
            watch.cancel()
        choices = [self.choice(asked, number, text) for number, text in enumerate(found)]
        written = sum(text.last.written for text in found)
        body = {**head, "object": self.whole, "choices": choices, "usage": protocol.usage(sum(map(len, prompts)), written)}
        return JSONResponse(body, headers=headers)

    async def events(
        self,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        first: tuple[int, Piece],
        pieces: AsyncIterator[tuple[int, Piece]],
        head: dict[str, object],
        left: threading.Event,
    ) -> AsyncIterator[str]:
        """Yield the events of a stream; when the client leaves, its texts end."""
        written, begun = dict.fromkeys(range(len(prompts)), 0), set[int]()
        texts = [Collected(prompt=tokens) for tokens in prompts]
        try:
            async for number, piece in _with(first, pieces):
                texts[number].add(piece)
                if asked.whole and piece.finish is None:
                    continue
                text, texts[number] = texts[number], Collected()
                choice = self.choice(asked, number, text, delta=True, first=number not in begun)
                begun.add(number)
                written[number] = piece.written
                yield _event({**head, "object": self.part, "choices": [choice]})
            if asked.stream_options and asked.stream_options.include_usage:
                numbers = protocol.usage(sum(map(len, prompts)), sum(written.values()))
                yield _event({**head, "object": self.part, "choices": [], "usage": numbers})
            yield "data: [DONE]\n\n"
        except WorkbenchError as error:
            yield _event(protocol.failure(error.message, "server_error"))
        finally:
            left.set()

    whole: str
    part: str

    def prompts(self, asked: Any) -> list[list[int]]:
        """Return the tokens of a request's prompts."""
        raise NotImplementedError

    def sampling(self, asked: Any, number: int, tokens: Sequence[int]) -> Sampling:
        """Return how text `number` of a request is written."""
        raise NotImplementedError

    def choice(self, asked: Any, number: int, text: Collected, *, delta: bool = False, first: bool = True) -> dict[str, object]:
        """Return a choice of an answer, or of an event of a stream."""
        raise NotImplementedError

    def form(self, asked: Any) -> Form | None:
        """Return what the texts of a request are held to."""
        return None

    def room(self, tokens: Sequence[int], most: int | None) -> int:
        """Return the number of new tokens that a prompt leaves room for, at most `most`.

        Raises:
            RefusedError: If the prompt is empty or too long, or leaves too little room.
        """
        left = self.served.longest - len(tokens)
        if not tokens:
            raise RefusedError(400, "invalid_request_error", "the prompt has no tokens", "prompt")
        if left < (most or 0):
            raise RefusedError(
                400,
                "invalid_request_error",
                f"this model reads {self.served.longest} tokens; the prompt has {len(tokens)}, and {most or 0} new ones are asked for",
                "max_tokens",
            )
        return left if most is None else most


class Completions(Endpoint):
    """`/v1/completions`."""

    asked, kind, whole, part = CompletionAsked, "cmpl", "text_completion", "text_completion"

    def prompts(self, asked: CompletionAsked) -> list[list[int]]:
        """Return the tokens of the prompts; of texts, with the special tokens that the tokenizer puts at their start."""
        tokenizer = self.served.engine.tokenizer
        found = [encode_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in asked.prompts()]
        size = self.served.engine.vocabulary
        if any(not 0 <= token < size for tokens in found for token in tokens):
            raise RefusedError(400, "invalid_request_error", f"a token of the prompt is none of 0 to {size - 1}", "prompt")
        return found

    def sampling(self, asked: CompletionAsked, number: int, tokens: Sequence[int]) -> Sampling:
        """Return how text `number` of a request is written."""
        most = protocol.DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        return asked.sampling(number, self.room(tokens, most), asked.logprobs, echo=asked.echo)

    def choice(
        self, asked: CompletionAsked, number: int, text: Collected, *, delta: bool = False, first: bool = True
    ) -> dict[str, object]:
        """Return a choice of an answer, or of an event of a stream."""
        return protocol.completion_choice(number, text, scored=asked.logprobs is not None)


class Chat(Endpoint):
    """`/v1/chat/completions`."""

    asked, kind, whole, part = ChatAsked, "chatcmpl", "chat.completion", "chat.completion.chunk"

    def prompts(self, asked: ChatAsked) -> list[list[int]]:
        """Return the tokens of the conversation under the tokenizer's chat template."""
        tokenizer = self.served.engine.tokenizer
        if not tokenizer.chat_template:
            raise RefusedError(400, "invalid_request_error", "this model has no chat template: ask /v1/completions", "messages")
        turns = [message.plain() for message in asked.messages]
        if asked.callable and (lacks := tools.missing(tokenizer, self.served.engine.model)):
            raise RefusedError(400, "invalid_request_error", f"tools: {lacks}", "tools")
        more = {"add_generation_prompt": asked.add_generation_prompt, "continue_final_message": asked.continue_final_message}
        write = partial(tokenizer.apply_chat_template, turns, tokenize=True, return_dict=False, **more)
        try:
            found = list(write(tools=asked.callable or None))
            unread = bool(asked.callable) and found == list(write())
        except Exception as error:  # a template is code of the model's author, which refuses roles and orders in its own way
            raise RefusedError(400, "invalid_request_error", f"the chat template refuses this: {error}", "messages") from error
        if unread:
            told = "this model's chat template does not read tools: ask without them, or serve a model whose template does"
            raise RefusedError(400, "invalid_request_error", f"tools: {told}", "tools")
        return [found]

    def form(self, asked: ChatAsked) -> Form | None:
        """Return what the texts of a request are held to."""
        schema = asked.response_format.schema_of
        try:
            return None if schema is None else form_of(self.served.engine, schema)
        except FormError as error:
            raise RefusedError(400, "invalid_request_error", f"response_format: {error.message}", "response_format") from error

    def sampling(self, asked: ChatAsked, number: int, tokens: Sequence[int]) -> Sampling:
        """Return how text `number` of a request is written."""
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return asked.sampling(number, self.room(tokens, most), asked.top)

    def choice(
        self, asked: ChatAsked, number: int, text: Collected, *, delta: bool = False, first: bool = True
    ) -> dict[str, object]:
        """Return a choice of an answer, or of an event of a stream."""
        found = protocol.chat_choice(number, text, scored=bool(asked.logprobs), delta=delta, first=first)
        engine, given = self.served.engine, asked.callable
        called = tools.parsed(engine.tokenizer, engine.model, text.prompt, text.last.ids, given) if given else None
        if called:
            calls = called["tool_calls"] if asked.parallel_tool_calls else called["tool_calls"][:1]
            called["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)] if delta else calls
            found["delta" if delta else "message"] |= called
            found["finish_reason"] = "tool_calls"
        return found


def application(served: Served) -> ASGIApp:
    """Return the application that serves a configuration."""

    def models(http: HttpRequest) -> Response:
        checked_key(served.key, http)
        names = (served.name, *served.bricks, *([BASE] if served.bricks else []))
        limits = {"choices": protocol.MOST_CHOICES, "prompt_tokens": served.prompt_tokens, "body_bytes": BODY}
        more = {"limits": {**limits, "waiting": served.engine.most, "seconds": served.seconds}}
        return JSONResponse(protocol.models(names, served.created, served.longest) | more)

    def health(_http: HttpRequest) -> Response:
        return PlainTextResponse("ok\n") if served.engine.alive else PlainTextResponse("the engine has ended\n", 503)

    def metrics(http: HttpRequest) -> Response:
        checked_key(served.key, http)
        text = engine_numbers(served.engine) + served.answers.text(served.engine.acted)
        return PlainTextResponse(text, media_type=KIND)

    routes = [
        Route("/v1/completions", Completions(served).respond, methods=["POST"]),
        Route("/v1/chat/completions", Chat(served).respond, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Guarded(Starlette(routes=routes, exception_handlers=failures()), served.key, served.answers)


async def _pieces(queue: asyncio.Queue[tuple[int, Piece]], count: int, seconds: float) -> AsyncGenerator[tuple[int, Piece]]:
    """Yield the pieces of some texts until all have ended.

    Raises:
        WorkbenchError: If a text could not be written.
        TimeoutError: If they take too long.
    """
    end = time.monotonic() + seconds
    while count:
        number, piece = await asyncio.wait_for(queue.get(), max(0.0, end - time.monotonic()))
        if piece.error:
            raise piece.error
        yield number, piece
        count -= piece.finish is not None


async def _with(first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield a piece, and then the others."""
    yield first
    async for pair in pieces:
        yield pair


async def _watch(http: HttpRequest, left: threading.Event, queue: asyncio.Queue[tuple[int, Piece]]) -> None:
    """Wait until a client leaves; then end its texts, and the wait for them."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)
    left.set()
    queue.put_nowait((0, Piece(error=gone())))


def headers_of(piece: Piece) -> dict[str, str]:
    """Return the headers that say which brick answers."""
    if piece.acted is None:
        return {}
    sure = {} if piece.confidence is None else {"X-Confidence": f"{piece.confidence:.4f}"}
    return {"X-Brick": piece.acted, **sure, "X-Abstained": str(piece.acted == BASE and piece.confidence is not None).lower()}


def _event(data: object) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def engine_numbers(engine: Engine) -> str:
    """Return the engine's numbers in Prometheus' text format."""
    running, waiting = engine.load
    found = family("running_texts", "gauge", "Texts that are being written.", [("", {}, running)])
    found += family("waiting_requests", "gauge", "Texts that wait to be begun.", [("", {}, waiting)])
    found += family("waiting_seconds", "histogram", "Time that a text waited to be begun.", engine.waited.rows())
    for name, told in COUNTED.items():
        found += family(f"{name}_total", "counter", told, [("", {}, engine.counts[name])])
    return found
