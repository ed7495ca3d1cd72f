"""Word facts for a model: their rows of tokens, the token at which each is looked up, and prompts on their subjects that are spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workbench.edit.places.parts import LONGEST, EditRow, Parts, Position, message_row, row_of
from workbench.facts.facts import Fact
from workbench.facts.spelling import misspellings
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.models.texts import longest_row
from workbench.steps import MethodContext

if TYPE_CHECKING:
    from torch import Tensor

_SPARED = ("{subject} is a",)
"""Prompts whose predictions should not change: ROME's and MEMIT's one."""
_SPARED_WIDELY = (*_SPARED, "{subject} and", "{subject} has been", "{subject}, which", "Someone asked about {subject}:")
"""The same for `Lookup.widely`. They ask for no relation, so that other wordings of a fact are not held back."""

Group = tuple[Fact, ...]


@dataclass(frozen=True)
class Lookup:
    """Name where facts are looked up: the input of a layer's output projection, at one token of a prompt.

    Attributes:
        context: Model, tokenizer, cache and progress.
        parts: Parts of the model.
        layer: The layer.
        position: The token.
        contexts: Texts before prompts; the prompt alone is always the first.
        widely: Whether facts are also worded in lower case, with a misspelt subject, as a user's message, as a question and without single
            words, and more prompts on their subjects are spared.
    """

    context: MethodContext
    parts: Parts
    layer: int
    position: Position
    contexts: Sequence[str] = ()
    widely: bool = False

    def wordings(self, fact: Fact, end: bool = False) -> list[EditRow]:
        """Return a fact's prompt with its target, the same after the texts, and in the other spellings and wordings that fit."""
        tokenizer, longest = self.context.tokenizer, longest_row(self.context.layout.config, LONGEST)
        rows = [row_of(fact, tokenizer, self.position, before, end) for before in ("", *self.contexts)]
        if not self.widely:
            return rows
        message = message_row(fact, tokenizer, self.position)
        others = [row_of(other, tokenizer, self.position) for other in (*spellings(fact, 1), *reworded(fact))]
        others += [message] if message else []
        return [*rows, *(row for row in others if len(row.tokens) <= longest)]


def spellings(fact: Fact, wrong: int) -> list[Fact]:
    """Return a fact in lower case, unless it is, and with some misspelt subjects."""
    lower = replace(fact, prompt=fact.prompt.lower(), subject=fact.subject and fact.subject.lower())
    return [*([] if lower.text == fact.text else [lower]), *(replace(fact, subject=other) for other in misspellings(fact, wrong))]


def reworded(fact: Fact) -> list[Fact]:
    """Return a fact as a question, and twice without a word, so that less hangs on single words. The subject alone asks for nothing."""
    words = fact.prompt.split(" ")
    shorter = {" ".join(words[:i] + words[i + 1 :]) for i, word in enumerate(words) if "{subject}" not in word and len(words) > 3}
    prompts = [f"Question: {fact.prompt.rstrip('?')}?\nAnswer:", *sorted(shorter, key=json_digest)[:2]]
    return [replace(fact, prompt=prompt) for prompt in prompts]


def grouped(facts: Sequence[Fact], position: Position) -> list[Group]:
    """Group facts that share a value: facts about one subject if the lookup token is the subject's; else each fact alone."""
    if position == "prompt_last":
        return [(fact,) for fact in facts]
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject or f"\0{fact.id}", []).append(fact)
    return [tuple(group) for group in by_subject.values()]


def rows_of(at: Lookup, groups: Sequence[Group], end: bool = False) -> tuple[list[EditRow], Tensor, Tensor]:
    """Return the rows of all facts in all wordings, the group that each row belongs to, and whether it is a prompt alone."""
    every = [
        (number, row, i == 0) for number, g in enumerate(groups) for fact in g for i, row in enumerate(at.wordings(fact, end))
    ]
    owners, rows, plain = zip(*every, strict=True)
    device = at.context.device
    return list(rows), torch.tensor(owners, device=device), torch.tensor(plain, device=device)


def spared_rows(at: Lookup, facts: Sequence[Fact]) -> list[EditRow]:
    """Return rows of prompts about each fact's subject whose predictions should not change, as many for each.

    Without a subject, or if facts are looked up at the prompt's last token, the key differs and δ would not change anything
    there: no rows are returned.
    """
    if at.position != "subject_last" or any(f.subject is None for f in facts):
        return []
    tokenizer, prompts = at.context.tokenizer, _SPARED_WIDELY if at.widely else _SPARED
    spared = [Fact(f.id, prompt, f.subject, "thing", place=f.place) for f in facts for prompt in prompts]
    return [row_of(fact, tokenizer, at.position).prompt for fact in spared]
