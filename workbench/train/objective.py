"""What a training minimizes: by default, the cross-entropy of the learned tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.train.rows import batch_loss, collate

if TYPE_CHECKING:
    from torch import Tensor


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
