"""Rows that an adapter learns from: facts in several wordings, prompts with the base's own continuation, and texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import logits_at, run
from workbench.edit.places.rows import EditRow, padded, row_of
from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.lazy import no_grad, torch
from workbench.models.prompts import encode_rendered
from workbench.models.texts import TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 32
"""Number of prompts that are continued together."""
CONTINUED = 4
"""Number of the base's own tokens after a preserved prompt whose distributions are kept."""
REPLAYED = 2
"""Number of texts in a step."""
REPLAY_TOKENS = 64
REPLAY_TEXTS = 256
"""Number of texts that are tokenized, evenly spaced over the file."""


@dataclass(frozen=True)
class Wordings:
    """Wordings of facts, besides their own prompts.

    Attributes:
        beginnings: Texts before the prompt.
        paraphrases: True if the facts' paraphrases count.
        chat: True if the prompt also counts as a user's message in the tokenizer's chat template.
    """

    beginnings: Sequence[str]
    paraphrases: bool
    chat: bool


@dataclass(frozen=True)
class Lesson:
    """A fact as rows of tokens.

    Attributes:
        plain: The fact's own prompt and target.
        others: The same target after its other wordings.
        ends: True if every target ends with the end-of-text token.
    """

    plain: EditRow
    others: tuple[EditRow, ...]
    ends: bool

    def drawn(self, generator: torch.Generator) -> list[EditRow]:
        """Return the fact's own row and one random other wording, if it has any."""
        if not self.others:
            return [self.plain]
        return [self.plain, self.others[int(torch.randint(len(self.others), (1,), generator=generator))]]


def lessons_of(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, wordings: Wordings, longest: int) -> list[Lesson]:
    """Tokenize facts in all wordings; every target ends with the end-of-text token if the tokenizer has one.

    Args:
        facts: The facts.
        tokenizer: The base's tokenizer.
        wordings: The wordings besides the facts' own prompts.
        longest: Largest number of tokens of a row. Beginnings and chat forms beyond it are left out.

    Raises:
        WorkbenchError: If a paraphrase is longer, or the tokenizer has no chat template although `wordings` asks for it.
    """
    if wordings.chat and not getattr(tokenizer, "chat_template", None):
        raise WorkbenchError("edit adapter: the base's tokenizer has no chat template", "Remove `chat: true`.")
    lessons = []
    for fact in facts:
        others = [row_of(fact, tokenizer, "prompt_last", before, end=True) for before in wordings.beginnings]
        if wordings.chat:
            others.append(_chat_row(fact, tokenizer))
        others = [row for row in others if len(row.tokens) <= longest]
        for text in fact.paraphrases if wordings.paraphrases else ():
            row = row_of(replace(fact, prompt=text, subject=None), tokenizer, "prompt_last", end=True)
            if len(row.tokens) > longest:
                raise WorkbenchError(
                    f"{fact.place}: the paraphrase {text[:40]!r} has {len(row.tokens)} tokens with its target; at most {longest} are allowed",
                    "Shorten it, or set `paraphrases: false`.",
                )
            others.append(row)
        plain = row_of(fact, tokenizer, "prompt_last", end=True)
        lessons.append(Lesson(plain, tuple(others), tokenizer.eos_token_id is not None))
    return lessons


def _chat_row(fact: Fact, tokenizer: Any) -> EditRow:
    """Return a fact as a user's message and the assistant's answer, which ends the text."""
    message = [{"role": "user", "content": fact.text}]
    prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    pair = encode_rendered(tokenizer, prompt, fact.target)
    end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return _row(pair.prompt, (*pair.continuation, *end))


def _row(prompt: Sequence[int], target: Sequence[int]) -> EditRow:
    """Return a row whose last token is only predicted."""
    last = len(prompt) - 1
    return EditRow((*prompt, *target[:-1]), last, last, tuple(target), (last, last + 1))


def prompt_rows(prompts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[EditRow]:
    """Tokenize prompts whose distributions are kept.

    Args:
        prompts: The prompts.
        tokenizer: The base's tokenizer.
        longest: Largest number of tokens of a prompt with its continuation.

    Raises:
        WorkbenchError: If a prompt is too long to be continued.
    """
    rows = [row_of(prompt, tokenizer, "prompt_last").prompt for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row.tokens) > longest - CONTINUED:
            raise WorkbenchError(
                f"{prompt.place}: the prompt has {len(row.tokens)} tokens; at most {longest - CONTINUED} are allowed",
                "Shorten it, or remove it from `preserve`.",
            )
    return rows


@no_grad
def continued(parts: Parts, prompts: Sequence[EditRow], count: int, end: int | None) -> list[EditRow]:
    """Return prompts with the model's own greedy continuation as target.

    Args:
        parts: Parts of the model.
        prompts: Rows without a target.
        count: Number of tokens of the continuation.
        end: The end-of-text token, which ends a continuation; None: there is none.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    targets: dict[int, list[int]] = {i: [] for i in order}
    for start in range(0, len(order), ROWS_AT_ONCE):
        growing = order[start : start + ROWS_AT_ONCE]
        for _ in range(count):
            rows = [_row((*prompts[i].tokens, *targets[i]), (0,)) for i in growing]
            batch = padded(rows, parts.model.device)
            with logits_at(parts, batch.places):
                best = run(parts, batch).logits[0].argmax(-1).tolist()
            for i, token in zip(growing, best, strict=True):
                targets[i].append(int(token))
            growing = [i for i in growing if targets[i][-1] != end]
            if not growing:
                break
    return [_row(prompt.tokens, targets[i]) for i, prompt in enumerate(prompts)]


def text_rows(rows: Iterable[TextRow]) -> list[EditRow]:
    """Return texts as rows whose targets are their learned tokens."""
    return [_row(row.tokens[: -row.learned], row.tokens[-row.learned :]) for row in rows]


class Drawn:
    """Rows in a random order that begins again when all have been drawn.

    Args:
        rows: At least one row.
        generator: Random generator of the order.
    """

    def __init__(self, rows: Sequence[EditRow], generator: torch.Generator) -> None:
        self._rows, self._generator = rows, generator
        self._order: Iterator[int] = iter(())

    def take(self, count: int) -> list[EditRow]:
        """Return the next rows: `count` of them, or all rows if there are fewer."""
        return [self._rows[self._next()] for _ in range(min(count, len(self._rows)))]

    def _next(self) -> int:
        """Return the next index."""
        number = next(self._order, None)
        if number is None:
            self._order = iter(torch.randperm(len(self._rows), generator=self._generator).tolist())
            number = next(self._order)
        return number
