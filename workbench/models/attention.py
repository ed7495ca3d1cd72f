"""Custom attention masks for transformers models, and output heads that compute logits of selected positions only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def windows(config: Any) -> dict[str, int | None]:
    """Map each kind of attention in a model to its sliding window, or to None if it has none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def additive_masks(
    visible: Tensor, queries: Tensor, keys: Tensor, kinds: Mapping[str, int | None], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the `attention_mask` that makes each query see exactly the given keys.

    Args:
        visible: [batch, query, key], true if a query may see a key.
        queries: [batch, query], positions.
        keys: [batch, key], positions. Sliding attention does not see keys that are a window or more before a query.
        kinds: Result of `windows`.
        dtype: The model's dtype.

    Returns:
        One mask, or one for each kind of attention if they differ.
    """
    longest = int(queries.max())
    if not any(window and longest >= window for window in kinds.values()):
        return _additive_mask(visible, queries, keys, None, dtype)  # all kinds of attention see the same keys
    masks = {kind: _additive_mask(visible, queries, keys, window, dtype) for kind, window in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive_mask(visible: Tensor, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return an additive mask [row, 1, query, key]: 0 for visible keys, the lowest number of the dtype for others."""
    if window:
        visible = visible & (queries[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


CACHES = ("past_key_values", "cache_params", "cache", "state")
"""Arguments of forward that hold the state of earlier tokens, and the fields of its output that do; names differ between versions and models."""


def cache_name(model: nn.Module) -> str:
    """Return the name of the model's argument for the keys and values of earlier positions."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def head_sees(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Pass only some positions to the output head, so that the logits are [1, places, vocabulary].

    This works because models process logits afterwards (soft caps, scales) element by element.

    Args:
        head: The model's output embedding.
        places: Positions in the flattened [batch, width].
    """

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[places][None], *inputs[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
