"""TALL masks: the elements of a merged delta that one brick uses.

Wang et al. 2024, Localizing Task Information for Improved Model Merging and Compression, arXiv 2405.07813, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.steps import Block

if TYPE_CHECKING:
    from torch import Tensor


def summed(block: Block, weights: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """Return the weighted deltas wᵢτᵢ of a block, which overwrite its deltas, and their sum."""
    weighted = [delta.mul_(weight) for delta, weight in zip(block.deltas, weights, strict=True)]
    total = torch.zeros_like(weighted[0])
    for delta in weighted:
        total.add_(delta)
    return weighted, total


def is_used(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return where a brick uses the merged delta, bool: |τ| ≥ t·|τ_mt − τ|."""
    return delta.abs() >= (total - delta).abs_().mul_(threshold)


def masked_sum(
    weights: Sequence[float], choose: Callable[[list[Tensor], Tensor], Tensor], lam: float
) -> Callable[[Block], Tensor]:
    """Return the function from a block to λ·m⊙Σwᵢτᵢ.

    Args:
        weights: One weight per brick.
        choose: Returns the mask m from the weighted deltas and their sum.
        lam: λ.
    """

    def delta(block: Block) -> Tensor:
        deltas, total = summed(block, weights)
        return total.mul_(choose(deltas, total)).mul_(lam)

    return delta
