"""Losses of items on a live model: sums of cross entropy in nats, and numbers of predicted tokens.

Perplexities, their changes and intervals are computed from these two numbers of each item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.labelled import ItemRow
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import head_sees
from workbench.models.texts import BATCH_TOKENS, batch_limit, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Scored: TypeAlias = Literal["whole", "response"]
"""Tokens whose loss counts: all but the first, or those of the response."""
LOGITS = 1 << 26
"""Largest number of logits of a batch, 256 MiB in float32."""
_CHUNK = 256  # predicted tokens whose log-probabilities are in memory at once


@dataclass(frozen=True)
class ItemLosses:
    """Losses of items.

    Attributes:
        sums: Sum of −log p over the predicted tokens of each item, in nats [items] float64.
        tokens: Number of predicted tokens of each item [items] int64; 0 for items without any.
    """

    sums: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Mean loss per token, in nats."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class SetLosses:
    """Losses of the same items on a model and on changed versions of it, such as one per neuron set that is switched off.

    Attributes:
        names: Names of the changed versions.
        base: Losses on the unchanged model.
        sums: Sum of −log p of each item on each changed version [versions, items] float64.
    """

    names: tuple[str, ...]
    base: ItemLosses
    sums: Tensor

    @property
    def tokens(self) -> Tensor:
        """Number of predicted tokens of each item [items]."""
        return self.base.tokens


@no_grad
def losses(model: PreTrainedModel, rows: Sequence[ItemRow], *, scored: Scored = "whole", logits: int = LOGITS) -> ItemLosses:
    """Compute the loss of every item.

    Rows of similar length form a batch. The output head sees only the positions that predict a counted token, and logits of one batch
    exist at a time. Equal calls form equal batches, so that an unchanged model gives equal bits.

    Args:
        model: The live model.
        rows: The items' texts.
        scored: Tokens whose loss counts. The first token of a text is never predicted.
        logits: Largest number of logits of a batch. A longer row is a batch of its own.

    Raises:
        WorkbenchError: If the model has no output head, or no item has a token that counts.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Losses need a causal language model.")
    device = next(model.parameters()).device
    first = [max(1, row.prompt) if scored == "response" else 1 for row in rows]
    counts = torch.tensor([max(0, len(row.tokens) - start) for row, start in zip(rows, first, strict=True)])
    if not counts.sum():
        what = "response" if scored == "response" else "second token"
        raise WorkbenchError(f"none of the {len(rows)} items has a {what} whose loss could be computed", "Use other texts.")
    vocabulary = int(model.config.get_text_config().vocab_size)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for index in loss_batches(
        [len(row.tokens) for row in rows], counts.tolist(), max(1, logits // vocabulary), batch_limit(device)
    ):
        batch = side_by_side([rows[i].tokens for i in index], device)
        width = batch.tokens.shape[1]
        # The token at position t is predicted at position t - 1.
        places = [b * width + t - 1 for b, i in enumerate(index) for t in range(first[i], len(rows[i].tokens))]
        wanted = batch.tokens.flatten()[torch.tensor(places, device=device) + 1]
        with head_sees(head, torch.tensor(places, device=device)):
            output = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[0]
        owners = torch.tensor(index).repeat_interleave(counts[index])
        sums.index_add_(0, owners, cross_entropies(output, wanted).double().cpu())
    return ItemLosses(sums, counts)


def cross_entropies(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return −log p of tokens in float32 [tokens], with the log-probabilities of few tokens in memory at a time.

    Args:
        logits: [tokens, vocabulary].
        wanted: The tokens [tokens].
    """
    parts = zip(torch.split(logits, _CHUNK), torch.split(wanted, _CHUNK), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(part.float(), target, reduction="none") for part, target in parts])


def loss_batches(lengths: Sequence[int], counts: Sequence[int], most: int, limit: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Yield indices of rows of similar length that form a batch; rows without a counted token are left out.

    Args:
        lengths: Number of tokens of each row.
        counts: Number of counted tokens of each row.
        most: Largest number of counted tokens of a batch.
        limit: Largest number of all tokens of a batch, including padding.
    """
    waiting: list[int] = []
    total = 0
    for i in sorted((i for i in range(len(lengths)) if counts[i]), key=lambda i: lengths[i]):
        if waiting and (lengths[i] * (len(waiting) + 1) > limit or total + counts[i] > most):
            yield waiting
            waiting, total = [], 0
        waiting.append(i)
        total += counts[i]
    if waiting:
        yield waiting
