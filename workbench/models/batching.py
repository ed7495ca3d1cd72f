"""Batches of rows of tokens for forward passes.

Rows are padded on the right. In a causal model a token sees only earlier tokens, so padding after a row changes nothing: positions,
attention and the state of recurrent layers are those of the row alone. Padding before a row would shift positions in models that count
them (GPT-2, GPTBigCode, XGLM, BioGPT, GPT-Neo) and change the state of recurrent layers without a mask (RWKV, RecurrentGemma).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        tokens: [row, position].
        mask: [row, position], 1 for a token and 0 for padding.
    """

    tokens: Tensor
    mask: Tensor


def side_by_side(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Return rows of tokens as one batch, padded on the right with token 0."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return Batch(tokens.to(device), mask.to(device))


def by_length(lengths: Sequence[int], limit: int, done: int = 0) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of similar length, the shortest rows first.

    Args:
        lengths: Number of tokens of each row.
        limit: Largest number of tokens of a batch, padding included; a longer row is a batch of its own.
        done: Number of rows in that order that are left out, because an earlier call has read them.
    """
    waiting: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i])[done:]:
        if waiting and lengths[i] * (len(waiting) + 1) > limit:
            yield waiting
            waiting = []
        waiting.append(i)
    if waiting:
        yield waiting
