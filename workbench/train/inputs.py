"""Inputs of a training: texts as tokenized rows, and a live model that the caller keeps using."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.models.texts import Text
from workbench.train.rows import encode_row, read_replay, replay
from workbench.train.spec import TrainSpec
from workbench.train.texts import Texts, training_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = tuple[list[int], int]
"""Token ids of a row, and the number of tokens at its end that are learned."""


@dataclass(frozen=True)
class Inputs:
    """The data of a training, which is read before any model is loaded.

    Attributes:
        texts: Training and held-out texts.
        skill: Tokens of the training texts.
        held_out: Tokens of the held-out texts.
        replayed: Replayed prompts with their completion, or None if the model samples it.
    """

    texts: Texts
    skill: list[Tokens]
    held_out: list[Tokens]
    replayed: list[tuple[str, str | None]]


def read_inputs(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path, *, chat: bool = True) -> Inputs:
    """Read and tokenize the data of a training.

    Args:
        spec: Settings of the training.
        tokenizer: Tokenizer of the base.
        data: The jsonl file of training rows.
        folder: Directory that other file names in the spec start from.
        chat: Whether conversations are read; otherwise they are refused.

    Raises:
        WorkbenchError: If a file or data set is missing or has a bad row.
    """
    texts = training_texts(spec, data, folder, chat=chat)

    def encoded(part: list[Text]) -> list[Tokens]:
        return [encode_row(tokenizer, text, spec.max_length, spec.learn_end) for text in part]

    prompts = read_replay(folder / spec.replay) if spec.replay else []
    return Inputs(texts, encoded(texts.trained), encoded(texts.held_out), prompts)


def scheduled(
    spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs
) -> tuple[list[Tokens], int]:
    """Return the rows of all steps, and the number of replayed rows at their end."""
    total = spec.steps * spec.batch_size
    replayed = replay(spec, model, tokenizer, inputs.replayed, round(total * spec.replay_share)) if inputs.replayed else []
    return [inputs.skill[index % len(inputs.skill)] for index in range(total - len(replayed))] + replayed, len(replayed)


@contextlib.contextmanager
def lent(model: PreTrainedModel | None) -> Iterator[None]:
    """Restore gradient flags, mode and cache setting of the caller's model after a training; None does nothing."""
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
