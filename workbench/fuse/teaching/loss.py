"""The loss of a fuse step: cross-entropy with the text, and with the fused distributions on k + 1 entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.lazy import torch
from workbench.train.rows import learned_logits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def fused_loss(logits: Tensor, targets: Tensor, ids: Tensor, probabilities: Tensor, weight: float) -> Tensor:
    """Return the mean loss of the learned tokens.

    A token with a fused distribution P has the loss (1 − w) · −log Q(text) + w · −Σ P log Q over the k tokens of P and the rest, which
    is all other tokens together. A token without one has the loss −log Q(text).

    Args:
        logits: Logits that predict the learned tokens, [learned token, vocabulary].
        targets: The learned tokens, [learned token].
        ids: Tokens of the fused distributions, [learned token, k].
        probabilities: Their probabilities, [learned token, k]; only zeros where there is no distribution.
        weight: The share w of the fused loss.
    """
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    taught = probabilities[:, 0] > 0
    if not bool(taught.any()):
        return losses.mean()
    chosen, known = logits[taught], probabilities[taught]
    # Empty columns repeat the first token with probability 0, so that they change neither sum.
    tokens = torch.where(known > 0, ids[taught], ids[taught][:, :1]).long()
    whole = chosen.logsumexp(-1)
    logs = chosen.gather(1, tokens) - whole[:, None]
    # The rest is summed without the k tokens: 1 − Σ would lose all digits where Q is nearly certain of them.
    rest = chosen.scatter(1, tokens, -torch.inf).logsumexp(-1) - whole
    fused = -(known * logs).sum(1) - (1 - known.sum(1)).clamp(min=0) * rest
    mixed = losses.masked_scatter(taught, (1 - weight) * losses[taught] + weight * fused)
    return mixed.mean()


def taught_loss(model: Any, batch: Mapping[str, Tensor], weight: float) -> Tensor:
    """Return the loss of a live model on a batch, plus the router loss if the model's configuration enables it.

    Args:
        model: A live causal language model.
        batch: A batch of `rows.collate` with `taught_ids` and `taught`, the fused distributions of its learned tokens.
        weight: Share of the fused loss.
    """
    logits, routers = learned_logits(model, batch)
    loss = fused_loss(logits, batch["targets"], batch["taught_ids"], batch["taught"], weight)
    return loss if routers is None else loss + routers
