"""Divergence between the next-token distributions of two models with one tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def mean_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of KL(wanted ‖ model) over tokens in nats, differentiable in `logits`.

    Rows beyond the vocabulary that both models have are padding and do not count.

    Args:
        wanted: Logits of the teacher [tokens, vocabulary].
        logits: Logits of the model [tokens, vocabulary].
    """
    count = min(logits.shape[-1], wanted.shape[-1])
    aim = wanted[..., :count].float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits[..., :count].float().log_softmax(-1), aim, reduction="batchmean", log_target=True)
