"""Maps from the weights alone: between the leading singular subspaces of the same weight in two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.weights import svd

if TYPE_CHECKING:
    from torch import Tensor

RANK = 320
"""Largest number of singular vectors of each weight."""


def subspace_maps(source: Tensor, target: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Return the maps of inputs and outputs between the leading singular subspaces of two weights.

    With W ≈ U S Vᵀ of rank k for both, the maps are V_s V_tᵀ and U_t U_sᵀ: the solutions P of min ‖P V_t − V_s‖ and min ‖P U_s − U_t‖
    in the Frobenius norm with the smallest norm. The signs of singular vectors are arbitrary; here each pair has the sign with which the
    third moment of its entries is positive, which no permutation of units changes.

    Args:
        source: The source's weight [source outputs, source inputs], float32.
        target: The target's weight [target outputs, target inputs], float32.
        rank: Number k of singular vectors; at most those that both weights have.

    Returns:
        Inputs of the target to inputs of the source [source inputs, target inputs], and outputs of the source to outputs of the target
        [target outputs, source outputs].

    Source:
        Xia et al. 2025, Cross-LoRA, arXiv 2508.05232: LoRA-Align and LoRA-Shift.
    """
    count = min(rank, *source.shape, *target.shape)
    (source_left, source_right), (target_left, target_right) = _singular(source, count), _singular(target, count)
    return source_right @ target_right.T, target_left @ source_left.T


def _singular(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the leading left and right singular vectors [outputs, count] and [inputs, count], with fixed signs."""
    left, _, right = svd.singular(weight, count, seed=0)
    skew = left.pow(3).sum(0) + right.T.pow(3).sum(0)
    sign = torch.where(skew < 0, -1.0, 1.0)
    return left * sign, right.T * sign
