"""Gradient sign masks: the elements of a delta that point down the target's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.models.hooks import frozen
from workbench.models.texts import TextRow, log_likelihood
from workbench.weights import svd
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TEXTS = 64
"""Largest number of texts that vote on a sign."""


def descent_signs(model: PreTrainedModel, modules: Sequence[str], rows: Sequence[TextRow]) -> dict[str, Tensor]:
    """Return the signs of −∂loss/∂W by majority of the texts: 1, −1, or 0 for a tie.

    Args:
        model: The live target.
        modules: Names of linear layers.
        rows: Texts as tokens; the first `TEXTS` of them vote.

    Returns:
        Module -> signs in the shape of its weight, int8.

    Source:
        Rinaldi et al. 2025, Gradient-Sign Masking for Task Vector Transport, arXiv 2510.09658: the vote that stands for the sign of the
        expected gradient where few texts are available.
    """
    weights = [model.get_submodule(name).weight for name in modules]
    votes = [torch.zeros(weight.shape, dtype=torch.int16) for weight in weights]
    device = weights[0].device
    with frozen(model):
        for weight in weights:
            weight.requires_grad_(True)
        for row in rows[:TEXTS]:
            gradients = torch.autograd.grad(log_likelihood(model, row, device), weights)
            for vote, gradient in zip(votes, gradients, strict=True):
                vote += gradient.sign().to("cpu", torch.int16)
        for weight in weights:
            weight.requires_grad_(False)
    return {name: vote.sign().to(torch.int8) for name, vote in zip(modules, votes, strict=True)}


def masked(update: Factors, signs: Tensor) -> tuple[Factors, Mapping[str, float]]:
    """Return an update without the elements whose sign the votes oppose, cut back to the same rank.

    Args:
        update: The update of one weight.
        signs: Signs in its shape.

    Returns:
        The update, and `kept`, the share of its elements that stay, and `cut`, the relative error of cutting the rest to the rank.
    """
    delta = update.left @ update.right
    keep = delta.sign() == signs
    left = torch.where(keep, delta, torch.zeros(()))
    size = float(left.norm())
    factors = svd.balanced(*svd.singular(left, update.rank, seed=0))
    error = float((factors.left @ factors.right - left).norm()) / size if size else 0.0
    return factors, {"kept": float(keep.float().mean()), "cut": error}
