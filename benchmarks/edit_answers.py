"""Answers of a live model: greedy decoding checked token by token, and mean log-likelihoods per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from workbench.edit.places.parts import EditRow, Parts, padded
from workbench.edit.places.passes import score
from workbench.facts.facts import Fact, joined
from workbench.models.prompts import encode_pair
from workbench.scores.statistics import score_interval
from workbench.steps import MethodContext

Pair = tuple[str, str]
"""A prompt and its answer."""
AT_ONCE = 32


def scored_answers(context: MethodContext, parts: Parts, pairs: Sequence[Pair]) -> tuple[list[float], list[bool]]:
    """Return each answer's mean log-likelihood per token, and whether each of its tokens is the most likely one."""
    rows = [_row(context.tokenizer, *pair) for pair in pairs]
    means, right = [0.0] * len(rows), [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(order), AT_ONCE):
        batch = order[start : start + AT_ONCE]
        mean, top = score(parts, padded([rows[i] for i in batch], context.device))
        for i, value, good in zip(batch, mean.tolist(), top.tolist(), strict=True):
            means[i], right[i] = value, good
    return means, right


def _row(tokenizer: Any, prompt: str, answer: str) -> EditRow:
    pair = encode_pair(tokenizer, prompt, joined(prompt, answer), "continuation")
    last = len(pair.prompt) - 1
    return EditRow(tuple(pair.tokens[:-1]), last, last, tuple(pair.continuation), (last, last + 1))


class Questions:
    """Prompts of facts by kind, with the model's current answers to prompts whose answers must not change."""

    def __init__(self, context: MethodContext, facts: Sequence[Fact]) -> None:
        from workbench.evaluate.answers import answers_to_keep

        self.context, self.facts, self.parts = context, list(facts), Parts.find(context)
        prompts = list(dict.fromkeys(probe.prompt for fact in facts for probe in fact.neighbours))
        base_answers = answers_to_keep(context.model, context.tokenizer, prompts, tokens=8) if prompts else {}
        self.questions: dict[str, list[tuple[int, Pair]]] = {
            "efficacy": [(i, (f.text, f.target)) for i, f in enumerate(facts)],
            "paraphrase": [(i, (text, f.target)) for i, f in enumerate(facts) for text in f.paraphrases],
            "neighbours": [
                (i, (p.prompt, base_answers[p.prompt]))
                for i, f in enumerate(facts)
                for p in f.neighbours
                if p.prompt in base_answers
            ],
        }

    def answers(self, kinds: Iterable[str] = ("efficacy", "paraphrase", "neighbours")) -> dict[str, list[bool]]:
        """Return kind -> whether the current model gives the expected answer to each of its prompts."""
        return {
            kind: scored_answers(self.context, self.parts, [pair for _, pair in self.questions[kind]])[1]
            for kind in kinds
            if self.questions[kind]
        }

    def shares(self, answers: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
        """Return kind -> share of right answers with its 95 % interval; prompts of one fact are one cluster."""
        return {kind: share(right, [i for i, _ in self.questions[kind]]) for kind, right in answers.items()}

    def of(self, numbers: range) -> Questions:
        """Return the questions of some facts; their clusters keep the facts' numbers."""
        some = object.__new__(Questions)
        some.context, some.parts, some.facts = self.context, self.parts, [self.facts[i] for i in numbers]
        some.questions = {kind: [(i, pair) for i, pair in pairs if i in numbers] for kind, pairs in self.questions.items()}
        return some


def share(right: Sequence[bool], cluster: Sequence[int]) -> dict[str, float]:
    """Return a share with its 95 % interval over clusters."""
    values = np.asarray(right, np.float64)
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    low, high = score_interval(values, index)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def perplexity(context: MethodContext, texts: Sequence[str]) -> float:
    """Return the perplexity of texts by tokens, of each the first 256."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([context.tokenizer(text)["input_ids"][:256]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = context.model(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    return float(torch.tensor(total / tokens).exp())
