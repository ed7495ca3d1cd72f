"""Answer requests with one live model, many at a time: a thread admits waiting requests into a running batch between two tokens."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.route.deciding.router import BASE
from workbench.serve.batch import Batch, writes_together
from workbench.serve.metrics import Histogram
from workbench.serve.writing import Sampling, Scored, Text, chosen, generator, prompt_scored, scored

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.serve.forms import Form

ROWS = 16
"""Number of rows that are written together."""
PREFILL = 4096
"""Number of places, padding among them, that new rows take in one pass; a longer prompt takes one of its own."""


@dataclass(frozen=True)
class Piece:
    """What is new of a text.

    Attributes:
        text: New characters.
        tokens: New tokens, if their probabilities were asked for.
        finish: Why the text has ended: "stop" or "length"; None while it goes on.
        ids: All its tokens, when it has ended.
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
    ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Request:
    """A text to be written.

    Attributes:
        tokens: The prompt.
        sampling: How it is written.
        take: Takes each piece, in the thread of the engine.
        brick: The brick that shall act, or "base"; None: the router chooses.
        left: Returns True when nobody waits for the text any more.
        begun: When it was made.
        form: What the text is held to.
    """

    tokens: Sequence[int]
    sampling: Sampling
    take: Callable[[Piece], None]
    brick: str | None = None
    left: Callable[[], bool] = bool
    begun: float = field(default_factory=time.monotonic)
    form: Form | None = None


_Found = TypeVar("_Found")
COUNTED = {
    "requests": "Texts that were asked for.",
    "prompt_tokens": "Tokens of prompts that were read.",
    "written_tokens": "Tokens that were written.",
    "failures": "Errors while texts were written.",
}
"""Number that is counted -> what it counts."""


class Source(Protocol):
    """What a model was made from, such as a router's files."""

    def changed(self) -> bool:
        """Return whether the model is no longer what its files say."""

    def renew(self) -> None:
        """Make the model what its files say."""


class FullError(WorkbenchError):
    """Too many requests wait."""


@dataclass(eq=False)
class _Row:
    """A request that is being written."""

    request: Request
    text: Text
    acted: str | None
    confidence: float | None
    draw: Any = None
    tokens: list[int] = field(default_factory=list)

    def begin(self, logits: Tensor, engine: Engine, *, whole: bool) -> bool:
        """Choose the first token, tell the prompt's probabilities if its `whole` has logits, and return whether the text goes on."""
        sampling = self.request.sampling
        self.draw = generator(sampling)
        told = prompt_scored(engine.tokenizer, self.request.tokens, logits, sampling.top or 0) if whole else ()
        if sampling.most == 0:
            self.request.take(Piece("", told, "length", 0, self.acted, self.confidence))
            return False
        engine.counts["written_tokens"] += 1
        return self.put(logits[-1], told, engine)

    def put(self, logits: Tensor, told: tuple[Scored, ...], engine: Engine) -> bool:
        """Choose the next token, pass on what is new, and return whether the text goes on."""
        sampling = self.request.sampling
        form = self.request.form
        token = chosen(form.allowed(logits) if form else logits, sampling, self.draw)
        self.tokens.append(token)
        if form:
            form.take(token)
        ended = token in engine.ends
        new = "" if ended else self.text.add(token)
        done = ended or self.text.stopped or (form is not None and form.ended)
        finish = "stop" if done else "length" if len(self.tokens) >= sampling.most else None
        if finish and not self.text.stopped:
            new += self.text.rest()
        if sampling.top is not None and not ended:
            told += (scored(engine.tokenizer, token, logits, sampling.top),)
        ids = tuple(self.tokens) if finish else ()
        self.request.take(Piece(new, told, finish, len(self.tokens), self.acted, self.confidence, ids=ids))
        return finish is None


class Engine:
    """Writes texts with a live model in a thread of its own.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        waiting: Largest number of requests that wait.
        source: What the model was made from, if it can change while it is served.

    Attributes:
        counts: Numbers since the start: requests, tokens read and written, texts of each brick and of the base, failures.
        waited: How long texts waited to be begun.
    """

    def __init__(self, model: Any, tokenizer: Any, waiting: int = 256, source: Source | None = None) -> None:
        self.model, self.tokenizer, self.most, self._source = model, tokenizer, waiting, source
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, (list, tuple)) else [ends])} - {None}
        self.counts: Counter[str] = Counter()
        self.acted: Counter[str] = Counter()
        self.waited = Histogram()
        self._batch, self._rows = Batch(model), list[_Row]()
        self._together = writes_together(model)
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
                self._waiting = deque(one for one in self._waiting if not one.left())
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
                renewed = self._source is not None and self._source.changed()
                new = [] if renewed else self._next()  # texts of the earlier bricks end before others join
            if renewed and not self._rows:
                assert self._source
                self._guarded(self._source.renew)
            if new:
                self._admit(new)
            if self._rows:
                self._advance()

    def _next(self) -> list[Request]:
        """Take the requests that are written next from those that wait."""
        taken: list[Request] = []
        widest = 0
        while self._waiting and len(self._rows) + len(taken) < (ROWS if self._together else 1):
            widest = max(widest, len(self._waiting[0].tokens))
            if taken and widest * (len(taken) + 1) > PREFILL:
                break
            request = self._waiting.popleft()
            if not request.left():
                self.waited.add(time.monotonic() - request.begun)
                taken.append(request)
        return taken

    def _guarded(self, work: Callable[[], _Found], *ended: Request) -> _Found | None:
        """Return the result of some work. An error ends the texts of `ended` alone, and the result is None."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  a model's own code may fail in any way, and the other clients wait
            told = error if isinstance(error, WorkbenchError) else WorkbenchError(f"{type(error).__name__}: {error}")
            self.counts["failures"] += 1
            for request in ended:
                with suppress(RuntimeError):  # the client's event loop is closed
                    request.take(Piece(finish="error", error=told))
            return None

    def _admit(self, new: Sequence[Request]) -> None:
        """Forward the prompts of requests, which join the batch, and choose their first tokens."""
        if not self._together:
            for request in new:
                self._guarded(partial(self._write, request), request)
            return
        routing = getattr(self.model, "routing", None)
        if routing is not None:
            new = [request for request in new if self._has(routing, request)]
        if not new:
            return
        every = [request.sampling.echo and request.sampling.top is not None for request in new]

        def join() -> tuple[list[Tensor], list[Any], list[Any]]:
            weights, acted, confidence = None, [None] * len(new), [None] * len(new)
            if routing is not None:
                weights, acted, confidence = _routed(routing, new)
            return self._batch.join([request.tokens for request in new], weights, every), acted, confidence

        found = self._guarded(join, *(new if len(new) == 1 else ()))
        if found is None:
            for request in new if len(new) > 1 else ():  # one is at fault, or they are too many for one pass
                self._admit([request])
            return
        going = list(range(len(self._rows)))
        for request, whole, own, brick, sure in zip(new, every, *found, strict=True):
            self.counts["prompt_tokens"] += len(request.tokens)
            self.acted[brick or "model"] += 1
            row = _Row(request, Text(self.tokenizer, request.sampling.stops), brick, sure)
            self._rows.append(row)
            if self._guarded(partial(row.begin, own, self, whole=whole), request):
                going.append(len(self._rows) - 1)
        self._keep(going)

    def _has(self, routing: Any, request: Request) -> bool:
        """Return whether the brick that a request names is still there, and answer the request if it is not."""
        there = request.brick in (None, BASE, *routing.bricks)
        if not there:
            request.take(Piece(finish="error", error=WorkbenchError(f"brick '{request.brick}' was removed meanwhile")))
        return there

    def _write(self, request: Request) -> None:
        """Write a text with the model's own `generate`, of a model whose rows cannot join a batch."""
        ids = torch.tensor([list(request.tokens)], device=self.model.device)
        row = _Row(request, Text(self.tokenizer, request.sampling.stops), None, None, generator(request.sampling))
        told: tuple[Scored, ...] = ()
        going = request.sampling.most > 0
        if request.sampling.echo and request.sampling.top is not None:
            with torch.inference_mode():
                told = prompt_scored(self.tokenizer, request.tokens, self.model(input_ids=ids).logits[0], request.sampling.top)
        if not going:
            request.take(Piece("", told, "length"))

        def choose(_ids: Tensor, scores: Tensor) -> Tensor:
            nonlocal told, going
            going, told = row.put(scores[0], told, self), ()
            self.counts["written_tokens"] += 1
            chosen = torch.full_like(scores, -torch.inf)
            chosen[0, row.tokens[-1]] = 0
            return chosen

        self.counts["prompt_tokens"] += len(request.tokens)
        self.acted["model"] += 1
        if going:
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.sampling.most,
                do_sample=False,
                logits_processor=[choose],
                stopping_criteria=[
                    lambda found, *_, **__: found.new_full((len(found),), not going or request.left(), dtype=bool)
                ],
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )

    def _advance(self) -> None:
        """Write one more token of each text."""
        tokens = [row.tokens[-1] for row in self._rows]
        found = self._guarded(partial(self._batch.step, tokens))
        logits = self._step_apart(tokens) if found is None else list(found)
        self.counts["written_tokens"] += len(self._rows)
        going = [
            i
            for i, (row, own) in enumerate(zip(self._rows, logits, strict=True))
            if self._guarded(partial(row.put, own, (), self), row.request) and not row.request.left()
        ]
        self._keep(going)

    def _step_apart(self, tokens: Sequence[int]) -> list[Tensor]:
        """Repeat a pass that failed row by row, end the texts that fail alone, and return the logits of the others."""
        rows, found, together = self._rows, list[Any](), Batch(self.model)
        self._rows = []
        for row, one, token in zip(rows, self._batch.apart(), tokens, strict=True):
            own = self._guarded(partial(one.step, [token]), row.request)
            if own is not None:
                together.extend(one)
                self._rows.append(row)
                found.append(own[0])
        self._batch = together
        return found

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
