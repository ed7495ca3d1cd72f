"""Hidden states of the base at one depth, pooled over the last tokens of each prompt.

The mean over the last tokens follows the request wherever it stands in the text; a mean over the whole prompt changes with a greeting
in front of it. Models give the first token of a text, and sometimes one or two early ones, a state of very large norm that has nothing
to do with its meaning (attention sinks). One of them would outweigh all other states in the mean, so they are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.lazy import no_grad, torch
from workbench.models.architecture import model_depth
from workbench.models.batching import side_by_side
from workbench.models.hooks import Stopped, hooked, states_of
from workbench.models.layout import stack_prefix
from workbench.models.prompts import encode_text
from workbench.models.texts import batch_limit, longest_row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WINDOW = 16
"""Number of last tokens that are pooled."""
SHIFTS = (0, 4, 8, 12)
"""Tokens after each of the windows of a prompt. The request may stand before thanks or a signature."""
POOLING = 2
"""Version of the pooling. Raise it when `pooled` gives other numbers: states that were kept before are then measured again."""
SINK = 4.0
"""A state whose norm is larger than this multiple of the row's median norm is left out. Other states lie below twice the median."""


def depth_of(model: PreTrainedModel) -> int:
    """Return the number of decoder blocks whose output is pooled: half of them.

    A third of the depth fails on some sets of bricks, and two thirds take longer and route no better.
    """
    return max(1, model_depth(model.config.to_dict()) // 2)


def token_rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of prompts, with the special tokens that the tokenizer puts at the start of a text."""
    return [encode_text(tokenizer, text) for text in texts]


def pooled(model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: int, window: int) -> Tensor:
    """Return pooled hidden states of prompts. Blocks after `layer` do not run.

    Args:
        model: A live decoder-only model.
        rows: The prompts' tokens, without padding.
        layer: Number of decoder blocks whose output is pooled, from 1.
        window: Number of tokens that are pooled; see `windows`.

    Returns:
        [row, one of `SHIFTS`, hidden size], float32, on the CPU.
    """
    return torch.stack([windows(states, window) for states in hidden_states(model, rows, layer)])


def windows(states: Tensor, window: int) -> Tensor:
    """Return means of a row [token, width] over windows that end some tokens before its end: [one of `SHIFTS`, width].

    The first token and attention sinks do not count; if there is only one state, it is returned. A window that the
    start of the row leaves with less than half of its tokens repeats the one before it.
    """
    if len(states) > 1:
        states = states[1:]
        norms = states.norm(dim=1)
        # The lower median is an existing norm, so at least one state is kept.
        states = states[norms <= SINK * norms.median()]
    means: list[Tensor] = []
    for shift in SHIFTS:
        end = len(states) - shift
        means.append(states[max(0, end - window) : end].mean(0) if shift == 0 or end >= max(1, window // 2) else means[-1])
    return torch.stack(means)


def moving(states: Tensor, window: int) -> Tensor:
    """Return `windows` of a row after each of its tokens: [token, width] -> [token, one of `SHIFTS`, width]."""
    return torch.stack([windows(states[: i + 1], window) for i in range(len(states))])


@no_grad
def hidden_states(model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """Return the output of a decoder block for each row.

    Args:
        model: A live decoder-only model.
        rows: Tokens, without padding. A row that is longer than the model's positions loses its start.
        layer: Number of decoder blocks to run, from 1.

    Returns:
        [token, hidden size] per row, float32, on the CPU.
    """
    config = model.config.to_dict()
    longest = longest_row(config, 1 << 30)
    rows = [list(row)[-longest:] for row in rows]
    block = model.get_submodule(f"{stack_prefix(model, model_depth(config))}.{layer - 1}")
    outputs: list[Tensor] = []
    read: list[Tensor] = []
    thread = threading.get_ident()

    def record(_module: Any, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:  # other threads may run the same model at the same time
            outputs.append(states_of(output, read[-1]).float().cpu())
            raise Stopped

    found: dict[int, Tensor] = {}
    with hooked(block, after=record):
        for numbers in token_batches(rows, model.device):
            batch = side_by_side([rows[i] for i in numbers], model.device)
            read[:] = [batch.tokens]
            try:
                model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
            except Stopped:
                states = outputs.pop()
                found |= {i: states[place, : len(rows[i])] for place, i in enumerate(numbers)}
    return [found[i] for i in range(len(rows))]


def token_batches(rows: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Return the numbers of rows in batches of similar length that a forward pass on the device is fast with."""
    limit = batch_limit(device)
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if groups and len(rows[i]) * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
