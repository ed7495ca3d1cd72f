"""Write a text token by token: choose tokens from logits, tell their probabilities, and turn them into characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

COLDEST = 1e-5
"""A lower temperature takes the most likely token: divided by it, logits leave float32's range."""
MARGIN = 8
"""Number of tokens before the new ones that are decoded with them, because a token's text depends on its neighbours."""


@dataclass(frozen=True)
class Sampling:
    """How a text is written.

    Attributes:
        most: Largest number of new tokens.
        temperature: Below `COLDEST`, the most likely token is taken.
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


def generator(sampling: Sampling) -> Any:
    """Return the source of a text's draws, which do not depend on the texts beside it; None if nothing is drawn."""
    if sampling.temperature < COLDEST:
        return None
    generator = torch.Generator()
    generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    return generator


def chosen(logits: Tensor, sampling: Sampling, draw: Any) -> int:
    """Return the next token: the most likely one, or one that is drawn."""
    if logits.isnan().any():
        raise WorkbenchError("the model's logits are not numbers", "Check its weights: workbench doctor")
    if draw is None:
        return int(logits.argmax())
    probabilities, order = (logits.float().cpu() / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[1:][before[1:] >= sampling.top_p] = 0  # the most likely one stays, also where float32 rounds top_p to 0
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


def prompt_scored(tokenizer: Any, tokens: Sequence[int], logits: Tensor, top: int) -> tuple[Scored, ...]:
    """Return the tokens of a prompt with their log-probabilities, from the logits [token, vocabulary] after each."""
    first = Scored(_told(tokenizer, tokens[0]), None)
    return (first, *(scored(tokenizer, token, before, top) for token, before in zip(tokens[1:], logits[:-1], strict=True)))


def _told(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


class Text:
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
        most = len(self._held) + 1
        lengths = ((n, stop) for stop in self._stops for n in range(1, min(len(stop), most)))
        open_ = max((n for n, stop in lengths if self._held.endswith(stop[:n])), default=0)
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
