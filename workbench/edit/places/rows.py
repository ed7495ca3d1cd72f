"""Facts as rows of tokens: contexts before the prompt, the place where a fact is looked up, the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.facts import Fact
from workbench.files import json_digest
from workbench.models.batching import side_by_side
from workbench.models.prompts import PromptPair, encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workbench.steps import MethodContext

Position = Literal["subject_last", "prompt_last"]


@dataclass(frozen=True)
class EditRow:
    """A prompt, or a prompt and its target, as tokens.

    Attributes:
        tokens: All of them; the last target token is left out where no one asks what follows it.
        lookup: Index of the token at which the fact is looked up.
        start: Index of the first token whose successor is a target token: the prompt's last.
        target: The target's tokens.
        span: First token of the subject and the one after its last.
    """

    tokens: tuple[int, ...]
    lookup: int
    start: int
    target: tuple[int, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class Padded:
    """Rows padded on the right, where a causal model cannot see the padding.

    Attributes:
        tokens: [row, position].
        mask: [row, position], 1 where a token stands.
        lookup: [row], position of the lookup.
        places: Flat indices into [row · position] of all positions that predict a target token, row by row.
        wanted: The tokens that they should predict.
        owner: Row of each of them.
        inputs: What the model is given beside the tokens, where that is not the mask.
    """

    tokens: Tensor
    mask: Tensor
    lookup: Tensor
    places: Tensor
    wanted: Tensor
    owner: Tensor
    inputs: Callable[[], dict[str, Any]] | None = None


def row_of(fact: Fact, tokenizer: PreTrainedTokenizerBase, position: Position, before: str = "", end: bool = False) -> EditRow:
    """A fact's prompt and target as tokens.

    Args:
        fact: The fact.
        tokenizer: A fast one: the subject's tokens are found by their character offsets.
        position: Where it is looked up; without a subject at the prompt's last token.
        before: A context in front of the prompt.
        end: Whether the end of text is one more token of the target, where the tokenizer has one.

    Errors: no fast tokenizer, a prompt or target without tokens, a subject without a token of its own.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise WorkbenchError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, by which edits find the subject",
            "Save the base with its fast tokenizer (tokenizer.json).",
        )
    text, shift = (f"{before}. {fact.text}", len(before) + 2) if before else (fact.text, 0)
    pair = fact_pair(fact, tokenizer, text)
    prompt, target = pair.prompt, tuple(pair.continuation)
    if end and tokenizer.eos_token_id is not None:
        target = (*target, int(tokenizer.eos_token_id))
    last = len(prompt) - 1
    span = (last, last + 1)
    if fact.span is not None:
        first, stop = fact.span[0] + shift, fact.span[1] + shift
        offsets = (pair.offsets or [])[: len(prompt)]  # a token that reaches into the target is the target's
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > first]
        if not inside:
            raise WorkbenchError(
                f"{fact.place}: the subject {fact.subject!r} has no token of its own",
                "Word the subject in what the tokenizer knows.",
            )
        span = (inside[0], inside[-1] + 1)
    lookup = span[1] - 1 if position == "subject_last" else last
    return EditRow((*prompt, *target[:-1]), lookup, last, target, span)


def fact_pair(fact: Fact, tokenizer: Any, text: str | None = None) -> PromptPair:
    """Tokenize a fact's prompt and target as lm-eval scores them: as one text, white space at the prompt's end with the target.

    Args:
        fact: The fact.
        tokenizer: The base's tokenizer.
        text: What stands in place of the fact's own prompt.

    Errors: a prompt or a target without tokens.
    """
    text = fact.text if text is None else text
    pair = encode_pair(tokenizer, text, fact.continuation, "continuation")
    if not pair.prompt or not pair.continuation:
        shown = fact.continuation if pair.prompt else text
        raise WorkbenchError(
            f"{fact.place or fact.id}: {shown!r} has no tokens in the base's vocabulary",
            "Word the fact in what the tokenizer knows.",
        )
    return pair


def vocabulary_key(context: MethodContext) -> str:
    """Digest of the tokenizer's vocabulary and rules."""
    return json_digest(context.tokenizer.backend_tokenizer.to_str())


def check_rows(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Errors, before any work: facts that `row_of` refuses, or that are longer than `longest` tokens."""
    for fact in facts:
        row = row_of(fact, tokenizer, "subject_last")
        if len(row.target) > longest // 2 or len(row.tokens) > longest:
            raise WorkbenchError(
                f"{fact.place}: prompt and target are {row.start + 1 + len(row.target)} tokens; {longest} fit, and half as many of a target",
                "Shorten it, or split it into several facts.",
            )


def padded(rows: Sequence[EditRow], device: torch.device) -> Padded:
    """Rows side by side."""
    batch = side_by_side([row.tokens for row in rows], device)
    width = batch.tokens.shape[1]
    places: list[int] = []
    wanted: list[int] = []
    owner: list[int] = []
    for i, row in enumerate(rows):
        places += [i * width + row.start + j for j in range(len(row.target))]
        wanted += row.target
        owner += [i] * len(row.target)
    lookup = torch.tensor([row.lookup for row in rows])
    at, answer, whose = (torch.tensor(values, dtype=torch.long, device=device) for values in (places, wanted, owner))
    return Padded(batch.tokens, batch.mask, lookup.to(device), at, answer, whose)
