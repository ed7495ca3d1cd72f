"""Attention masks of one's own for transformers models, and an output head that sees a few positions alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def windows(config: Any) -> dict[str, int | None]:
    """Attention kind -> its window; one entry for models with one kind."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def additive_masks(
    visible: Tensor, queries: Tensor, keys: Tensor, kinds: Mapping[str, int | None], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a model takes as `attention_mask` so that each query sees exactly these keys: one mask, or one for each kind of attention.

    Args:
        visible: [batch, query, key], true where a query may see a key.
        queries, keys: [batch, ·], positions; what lies a window or more before a query is hidden from sliding attention.
        kinds: From `windows`.
        dtype: Of the model.
    """
    longest = int(queries.max())
    if not any(window and longest >= window for window in kinds.values()):
        return _additive(visible, queries, keys, None, dtype)  # all kinds of attention see the same
    masks = {kind: _additive(visible, queries, keys, window, dtype) for kind, window in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(visible: Tensor, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    if window:
        visible = visible & (queries[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def cache_name(model: nn.Module) -> str:
    """What the model calls its keys and values of earlier positions."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def head_sees(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Hand the output head some positions of [batch, width, hidden], flattened: the logits are [1, places, vocabulary]. What a model
    does with logits afterwards (soft caps, scales) is element-wise."""

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[places][None], *inputs[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
