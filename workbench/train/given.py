"""What a training is given: texts as rows of tokens, and a live model that is lent to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.models.texts import Text
from workbench.train.rows import encode, read_replay, replay
from workbench.train.spec import TrainSpec
from workbench.train.texts import Texts, training_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = tuple[list[int], int]
"""Ids of a row, and how many at its end are learned."""


@dataclass(frozen=True)
class Given:
    """What is read before a model is: texts, their tokens, prompts that are replayed."""

    texts: Texts
    skill: list[Tokens]
    held_out: list[Tokens]
    replayed: list[tuple[str, str | None]]


def read_given(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path) -> Given:
    """Everything that may be wrong with the data is found here."""
    texts = training_texts(spec, data, folder)

    def encoded(part: list[Text]) -> list[Tokens]:
        return [encode(tokenizer, text.prompt, text.answer, spec.max_length, spec.learn_end) for text in part]

    prompts = read_replay(folder / spec.replay) if spec.replay else []
    return Given(texts, encoded(texts.trained), encoded(texts.held_out), prompts)


def scheduled(
    spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Given
) -> tuple[list[Tokens], int]:
    """The rows of all steps, and how many at their end are replayed."""
    total = spec.steps * spec.batch_size
    replayed = replay(spec, model, tokenizer, given.replayed, round(total * spec.replay_share)) if given.replayed else []
    return [given.skill[index % len(given.skill)] for index in range(total - len(replayed))] + replayed, len(replayed)


@contextlib.contextmanager
def lent(model: PreTrainedModel | None) -> Iterator[None]:
    """Put back what a training sets on a model that goes on living: gradients, mode, use of the cache."""
    if model is None:
        yield
        return
    flags, mode, cache = [(p, p.requires_grad) for p in model.parameters()], model.training, model.config.use_cache
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(mode)
        model.config.use_cache = cache
