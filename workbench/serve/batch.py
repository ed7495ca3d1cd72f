"""A running batch of texts of one live model: rows join when they arrive and leave when their text has ended.

Keys and values are filled up on the left, so that the newest key of every row stands last. Each token sees the earlier keys of its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import refuses_memory
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import additive_masks, cache_name, head_sees, windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


ROUNDING = 32
"""Largest difference of logits that another order of sums explains, in units of the dtype's rounding of the largest logit."""


class Batch:
    """Rows of tokens with their keys and values. A pass that fails leaves the rows as they were.

    Args:
        model: Model in evaluation mode, whose attention accepts a mask of [batch, 1, queries, keys]. A routed one gets the weights of its
            rows.

    Attributes:
        weights: [row, brick], the weights of the bricks; None if the model is not routed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights: Tensor | None = None
        self._head, self._windows, self._cache_name = model.get_output_embeddings(), windows(model.config), cache_name(model)
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values [row, head, place, width] of each layer
        self._places = self._real = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def __len__(self) -> int:
        return len(self._places)

    def apart(self) -> list[Batch]:
        """Return each row as a batch of its own."""
        found = [copy(self) for _ in range(len(self))]
        for row, batch in enumerate(found):
            batch.keep([row])
        return found

    def extend(self, other: Batch) -> None:
        """Put the rows of another batch of the same model behind these."""
        self._add(other._layers, other._places, other._real, other.weights)

    def join(self, rows: Sequence[Sequence[int]], weights: Tensor | None, every: Sequence[bool]) -> list[Tensor]:
        """Forward new rows, which join behind the others.

        Args:
            rows: Their tokens, at least one each.
            weights: [row, brick], the weights of the bricks on them.
            every: Which rows need the logits after every token; the others need those after the last one.

        Returns:
            The logits of each row: [tokens or 1, vocabulary].
        """
        from transformers import DynamicCache

        device, width = self.model.device, max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        order = torch.arange(width, device=device).expand(len(rows), -1)
        real = order >= width - lengths[:, None]
        places = (order - (width - lengths[:, None])).clamp(min=0)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        wanted = [
            i * width + width - (len(row) if whole else 1) + k
            for i, (row, whole) in enumerate(zip(rows, every, strict=True))
            for k in range(len(row) if whole else 1)
        ]
        # A place of padding sees itself: a row of a mask in which nothing is seen has no softmax.
        seen = (real[:, None] & (order[:, None] <= order[:, :, None])) | torch.eye(width, dtype=torch.bool, device=device)
        cache = (
            DynamicCache()
        )  # without the configuration, sliding layers keep all tokens; the mask hides those outside the window
        logits = self._forward(ids, places, places, seen, cache, torch.tensor(wanted, device=device), weights)
        self._add([(layer.keys, layer.values) for layer in cache.layers], places, real.long(), weights)
        return list(torch.split(logits, [len(row) if whole else 1 for row, whole in zip(rows, every, strict=True)]))

    def _add(self, new: list[tuple[Tensor, Tensor]], places: Tensor, real: Tensor, weights: Tensor | None) -> None:
        """Put rows behind the others: keys and values of each layer, places, which of them are no padding, and weights."""
        if len(self):
            wide = max(places.shape[1], self._places.shape[1])
            new = [
                tuple(torch.cat([_filled(old, wide, 2), _filled(part, wide, 2)]) for old, part in zip(one, two, strict=True))  # type: ignore[misc]
                for one, two in zip(self._layers, new, strict=True)
            ]
            places = torch.cat([_filled(self._places, wide, 1), _filled(places, wide, 1)])
            real = torch.cat([_filled(self._real, wide, 1), _filled(real, wide, 1)])
            weights = weights if weights is None or self.weights is None else torch.cat([self.weights, weights])
        self._layers, self._places, self._real, self.weights = new, places, real, weights  # at the end, when nothing can fail

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Forward one more token of each row, and return the logits after it [row, vocabulary]."""
        from transformers import DynamicCache

        device = self.model.device
        queries = self._places[:, -1:] + 1
        one = torch.ones(len(self), 1, dtype=torch.long, device=device)
        places, real = torch.cat([self._places, queries], 1), torch.cat([self._real, one], 1)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, index)
        ids = torch.tensor(list(tokens), device=device)[:, None]
        seen = real[:, None].bool()
        logits = self._forward(ids, queries, places, seen, cache, torch.arange(len(self), device=device), self.weights)
        self._layers, self._places, self._real = [(layer.keys, layer.values) for layer in cache.layers], places, real
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, and of their keys none that is padding in all."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.model.device)
        self._places, self._real = self._places[index], self._real[index]
        first = int(self._real.any(0).long().argmax()) if len(rows) else self._real.shape[1]
        self._places, self._real = self._places[:, first:], self._real[:, first:]
        self._layers = [(keys[index, :, first:], values[index, :, first:]) for keys, values in self._layers]
        if self.weights is not None:
            self.weights = self.weights[index.cpu()]

    def _forward(
        self, ids: Tensor, queries: Tensor, keys: Tensor, seen: Tensor, cache: Any, wanted: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Return the logits [place, vocabulary] at some places of a pass."""
        mask = additive_masks(seen, queries, keys, self._windows, self.model.dtype)
        inputs = {"input_ids": ids, "position_ids": queries, "attention_mask": mask, self._cache_name: cache}
        with torch.inference_mode(), head_sees(self._head, wanted), self._acting(weights):
            logits: Tensor = self.model(**inputs, use_cache=True).logits[0]
        return logits

    def _acting(self, weights: Tensor | None) -> AbstractContextManager[None]:
        """Let the bricks act with the weights of the rows."""
        found: AbstractContextManager[None] = nullcontext() if weights is None else self.model.routing.fixed(weights)
        return found


@no_grad
def writes_together(model: Any) -> bool:
    """Return whether rows of a model can be written together: whether a short one has the same logits beside a longer one, and after it."""
    routing = getattr(model, "routing", None)
    if getattr(model, "_is_stateful", False) or getattr(model, "recall", None) is not None:
        return False
    if routing is not None and (routing.by_token or routing.whole_rows):
        return False
    long, short = list(range(1, 12)), [3, 1, 2]
    try:
        batch, weights = Batch(model), None if routing is None else torch.zeros(1, len(routing.bricks))
        found = [batch.join([row], weights, [True])[0] for row in (long, short)] + list(batch.step([4, 5])[:, None])
        with nullcontext() if routing is None else routing.fixed(None):
            rows = [(long, slice(None)), (short, slice(None)), ([*long, 4], slice(-1, None)), ([*short, 5], slice(-1, None))]
            expected = [model(input_ids=torch.tensor([row], device=model.device)).logits[0, part] for row, part in rows]
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        if refuses_memory(error):
            raise
        return False
    bound = ROUNDING * torch.finfo(model.dtype).eps
    return all(bool(((a - b).abs().max() <= bound * b.abs().max()).item()) for a, b in zip(found, expected, strict=True))


def _filled(tensor: Tensor, width: int, axis: int) -> Tensor:
    """Return a tensor with zeros put before an axis until it is wide enough."""
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], axis) if shape[axis] else tensor
