"""Answer requests with one live model, many at a time: a thread admits waiting requests into a running batch between two tokens."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.serve.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Number of rows that are written together."""
PREFILL = 4096
"""Number of places, padding among them, that new rows take in one pass; a longer prompt takes one of its own."""
MARGIN = 8
"""Number of tokens before the new ones that are decoded with them, because a token's text depends on its neighbours."""


@dataclass(frozen=True)
class Sampling:
    """How a text is written.

    Attributes:
        most: Largest number of new tokens.
        temperature: 0 takes the most likely token.
        top_p: Share of probability of the most likely tokens among which one is drawn.
        seed: Seed of the draws; None: another one each time.
        stops: Strings that end the text; they do not belong to it.
        top: Number of other likely tokens whose probabilities are told; None: no probabilities.
        echo: The tokens of the prompt are told, too.
    """

    most: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, which the first token of a prompt has not, and those of likely tokens in its place."""

    text: str
    log_probability: float | None
    top: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Piece:
    """What is new of a text.

    Attributes:
        text: New characters.
        tokens: New tokens, if their probabilities were asked for.
        finish: Why the text has ended: "stop" or "length"; None while it goes on.
        written: Number of new tokens so far.
        acted: The brick that acts, or "base"; None for a model without a router.
        confidence: How certain the router is; None if it was not asked.
        error: What went wrong; the text ends with it.
    """

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None
    written: int = 0
    acted: str | None = None
    confidence: float | None = None
    error: WorkbenchError | None = None


@dataclass(eq=False)
class Request:
    """A text to be written.

    Attributes:
        tokens: The prompt.
        sampling: How it is written.
        take: Takes each piece, in the thread of the engine.
        brick: The brick that shall act, or "base"; None: the router chooses.
        left: Returns True when nobody waits for the text any more.
    """

    tokens: Sequence[int]
    sampling: Sampling
    take: Callable[[Piece], None]
    brick: str | None = None
    left: Callable[[], bool] = bool


COUNTED = ("requests", "prompt_tokens", "written_tokens", "failures")
"""Names of the numbers that are counted."""


class FullError(WorkbenchError):
    """Too many requests wait."""


@dataclass(eq=False)
class _Row:
    """A request that is being written."""

    request: Request
    text: _Text
    acted: str | None
    confidence: float | None
    draw: Any
    tokens: list[int] = field(default_factory=list)

    def put(self, logits: Tensor, told: tuple[Scored, ...], engine: Engine) -> bool:
        """Choose the next token, pass on what is new, and return whether the text goes on."""
        sampling = self.request.sampling
        token = _chosen(logits, sampling, self.draw)
        self.tokens.append(token)
        ended = token in engine.ends
        new = "" if ended else self.text.add(token)
        finish = "stop" if ended or self.text.stopped else "length" if len(self.tokens) >= sampling.most else None
        if finish and not self.text.stopped:
            new += self.text.rest()
        if sampling.top is not None and not ended:
            told += (scored(engine.tokenizer, token, logits, sampling.top),)
        self.request.take(Piece(new, told, finish, len(self.tokens), self.acted, self.confidence))
        return finish is None


class Engine:
    """Writes texts with a live model in a thread of its own.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        waiting: Largest number of requests that wait.

    Attributes:
        counts: Numbers since the start: requests, tokens read and written, texts of each brick and of the base, failures.
    """

    def __init__(self, model: Any, tokenizer: Any, waiting: int = 256) -> None:
        self.model, self.tokenizer, self.most = model, tokenizer, waiting
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, (list, tuple)) else [ends])} - {None}
        self.counts: Counter[str] = Counter()
        self.acted: Counter[str] = Counter()
        self._batch, self._rows = Batch(model), list[_Row]()
        self._waiting: deque[Request] = deque()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            FullError: If too many wait already, or the engine closes.
        """
        with self._changed:
            if self._closing:
                raise FullError("the server is stopping", "Try again later.")
            if len(self._waiting) >= self.most:
                raise FullError(f"{len(self._waiting)} requests are waiting already", "Try again later.")
            self._waiting.append(request)
            self.counts["requests"] += 1
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model reads."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def load(self) -> tuple[int, int]:
        """Number of texts that are being written, and of requests that wait."""
        return len(self._rows), len(self._waiting)

    def close(self, seconds: float | None = None) -> bool:
        """Take no more requests, finish those that are there, and return whether this took at most some seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._rows)
                if self._closing and not self._waiting and not self._rows:
                    return
                new = self._next()
            if new:
                self._guarded(partial(self._admit, new), new)
            if self._rows:
                self._guarded(self._advance, [])

    def _next(self) -> list[Request]:
        """Take the requests that are written next from those that wait."""
        taken: list[Request] = []
        widest = 0
        while self._waiting and len(self._rows) + len(taken) < ROWS:
            widest = max(widest, len(self._waiting[0].tokens))
            if taken and widest * (len(taken) + 1) > PREFILL:
                break
            request = self._waiting.popleft()
            if not request.left():
                taken.append(request)
        return taken

    def _guarded(self, work: Callable[[], None], new: Sequence[Request]) -> None:
        """Do some work; an error ends all texts that it may have touched, and the engine goes on."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  a model's own code may fail in any way, and the other clients wait
            told = error if isinstance(error, WorkbenchError) else WorkbenchError(f"{type(error).__name__}: {error}")
            self.counts["failures"] += 1
            running = [row.request for row in self._rows]
            self._rows, self._batch = [], Batch(self.model)
            for request in [*running, *(one for one in new if one not in running)]:
                request.take(Piece(finish="error", error=told))

    def _admit(self, new: Sequence[Request]) -> None:
        """Forward the prompts of requests, which join the batch, and choose their first tokens."""
        routing = getattr(self.model, "routing", None)
        weights, acted, confidence = None, [None] * len(new), [None] * len(new)
        if routing is not None:
            weights, acted, confidence = _routed(routing, new)
        every = [request.sampling.echo and request.sampling.top is not None for request in new]
        logits = self._batch.join([request.tokens for request in new], weights, every)
        going = list(range(len(self._rows)))
        for request, own, brick, sure, whole in zip(new, logits, acted, confidence, every, strict=True):
            self.counts["prompt_tokens"] += len(request.tokens)
            self.acted[brick or "model"] += 1
            row = _Row(request, _Text(self.tokenizer, request.sampling.stops), brick, sure, _generator(request.sampling))
            told = _prompt_scored(self.tokenizer, request.tokens, own, request.sampling.top or 0) if whole else ()
            if request.sampling.most == 0:
                request.take(Piece("", told, "length", 0, brick, sure))
                going_on = False
            else:
                self.counts["written_tokens"] += 1
                going_on = row.put(own[-1], told, self)
            self._rows.append(row)
            if going_on:
                going.append(len(self._rows) - 1)
        self._keep(going)

    def _advance(self) -> None:
        """Write one more token of each text."""
        logits = self._batch.step([row.tokens[-1] for row in self._rows])
        self.counts["written_tokens"] += len(self._rows)
        going = [
            i
            for i, (row, own) in enumerate(zip(self._rows, logits, strict=True))
            if row.put(own, (), self) and not row.request.left()
        ]
        self._keep(going)

    def _keep(self, going: Sequence[int]) -> None:
        """Keep the texts that go on."""
        if len(going) < len(self._rows):
            self._batch.keep(going)
            self._rows = [self._rows[i] for i in going]


def _routed(routing: Any, new: Sequence[Request]) -> tuple[Tensor, list[Any], list[Any]]:
    """Return the weights [row, brick] of requests, the brick that acts on each, and the router's confidence where it was asked."""
    weights = torch.zeros(len(new), len(routing.bricks))
    confidence: list[float | None] = [None] * len(new)
    for i, request in enumerate(new):
        if request.brick in routing.bricks:
            weights[i, routing.bricks.index(request.brick)] = 1.0
    asked = [i for i, request in enumerate(new) if request.brick is None]
    if asked:
        made = routing.decide([new[i].tokens for i in asked])
        weights[asked] = made.weights
        for i, sure in zip(asked, made.confidence.tolist(), strict=True):
            confidence[i] = sure
    return weights, [routing.label(row) for row in weights], confidence


def _generator(sampling: Sampling) -> Any:
    """Return the source of a text's draws, which do not depend on the texts beside it; None if nothing is drawn."""
    if not sampling.temperature:
        return None
    generator = torch.Generator()
    generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    return generator


def _chosen(logits: Tensor, sampling: Sampling, draw: Any) -> int:
    """Return the next token: the most likely one, or one that is drawn."""
    if logits.isnan().any():
        raise WorkbenchError("the model's logits are not numbers", "Check its weights: workbench doctor")
    if draw is None:
        return int(logits.argmax())
    probabilities, order = (logits.float().cpu() / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=draw)])


def scored(tokenizer: Any, token: int, logits: Tensor, top: int) -> Scored:
    """Return a token with its log-probability, and the likeliest ones in its place.

    Args:
        tokenizer: The tokenizer.
        token: The token.
        logits: [vocabulary], before it.
        top: Number of the likeliest ones.
    """
    found = torch.log_softmax(logits, -1, dtype=torch.float32)
    best = found.topk(top) if top else None
    others = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return Scored(_told(tokenizer, token), float(found[token]), tuple((_told(tokenizer, one), value) for one, value in others))


def _prompt_scored(tokenizer: Any, tokens: Sequence[int], logits: Tensor, top: int) -> tuple[Scored, ...]:
    """Return the tokens of a prompt with their log-probabilities, from the logits [token, vocabulary] after each."""
    first = Scored(_told(tokenizer, tokens[0]), None)
    return (first, *(scored(tokenizer, token, before, top) for token, before in zip(tokens[1:], logits[:-1], strict=True)))


def _told(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


class _Text:
    """Turns tokens into text as they come: characters of several tokens and beginnings of stop strings wait for what follows."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is known
        self._held = ""

    def add(self, token: int) -> str:
        """Add a token, and return the characters that are certain now."""
        self._tokens.append(token)
        start = max(0, self._read - MARGIN)
        before = self._decoded(self._tokens[start : self._read])
        now = self._decoded(self._tokens[start:])
        if now.endswith("�") and len(self._tokens) - self._read < MARGIN:
            return ""
        self._read = len(self._tokens)
        self._held += now[len(before) :]
        ends = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]
            return self.rest()
        open_ = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        known, self._held = self._held[: len(self._held) - open_], self._held[len(self._held) - open_ :]
        return known

    def rest(self) -> str:
        """Return the characters that have waited, at the end of the text."""
        start = max(0, self._read - MARGIN)
        if not self.stopped:
            self._held += self._decoded(self._tokens[start:])[len(self._decoded(self._tokens[start : self._read])) :]
        self._read = len(self._tokens)
        held, self._held = self._held, ""
        return held

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
