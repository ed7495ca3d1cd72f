"""What a training minimizes: by default, the cross-entropy of the learned tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch
from workbench.models.hooks import mean_divergence
from workbench.train.rows import batch_loss, collate, learned_logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Objective:
    """The loss of a training, and the batches that it is computed on.

    Attributes:
        collate: Returns a batch of rows, which are token ids and the number of learned tokens; the batch has at least the entries of
            `rows.collate`.
        loss: Returns the loss of a live model on a batch, as a scalar.
        digest: Digest of everything that determines the loss, if it is not the default one.
        record: Entries for the training record.
    """

    collate: Callable[[Sequence[tuple[list[int], int]]], dict[str, Tensor]] = collate
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor] = batch_loss
    digest: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


CROSS_ENTROPY = Objective()


def distillation(teacher: PreTrainedModel) -> Objective:
    """Return the objective of a model that learns a teacher's distributions: mean KL(teacher ‖ model) over the learned tokens.

    Args:
        teacher: The live teacher, which has the same tokenizer; it does not change.
    """
    return Objective(loss=partial(_taught_loss, teacher))


def _taught_loss(teacher: PreTrainedModel, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the divergence on a batch, plus the router loss if the model's configuration enables it."""
    with torch.no_grad():
        wanted, _ = learned_logits(teacher, batch)
    logits, routers = learned_logits(model, batch)
    loss = mean_divergence(wanted, logits)
    return loss if routers is None else loss + routers
