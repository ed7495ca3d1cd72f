"""Run only the part of a batch that an edit can change: tokens from the lookup on, and layers from the edited one up.

Earlier tokens and lower layers of a causal model do not depend on the edit. Their keys, values and hidden states are computed
once for all optimization steps. If a model does not give the same numbers this way, whole rows are run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import run, score
from workbench.edit.places.rows import Padded
from workbench.lazy import torch
from workbench.models.hooks import Stopped, additive_masks, cache_name, hooked, windows

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference of a row's mean log-probability, in nats, that a different order of float32 sums explains.
TOLERANCE = 1e-3


@contextmanager
def upper(parts: Parts, layer: int, batch: Padded) -> Iterator[Padded]:
    """Yield the batch to run within the block; its `lookup`, `places`, `targets` and `owner` refer to its own tokens.

    Args:
        parts: Parts of the model; its weights must not change within the block.
        layer: The edited layer.
        batch: Whole rows.
    """
    small = _tail(parts, batch)
    with _from_layer(parts, layer, small):
        yield small


def _tail(parts: Parts, batch: Padded) -> Padded:
    """Return the tokens from each row's lookup on, with a cache of the earlier ones; the whole batch if that is not supported."""
    if int(batch.lookup.max()) < 2:
        return batch
    try:
        small = _cut(parts, batch)
        expected, actual = score(parts, batch)[0], score(parts, small)[0]
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError):
        return batch  # the model does not accept a cache, positions or a custom mask
    return small if float((expected - actual).abs().max()) < TOLERANCE else batch


def _cut(parts: Parts, batch: Padded) -> Padded:
    """Return the tail of a batch with a cache of its own."""
    from transformers import DynamicCache

    device, rows = batch.tokens.device, len(batch.lookup)
    earlier_width, width = int(batch.lookup.max()), int((batch.mask.sum(1) - batch.lookup).max())
    name, kinds, dtype = cache_name(parts.model), windows(parts.model.config), parts.model.dtype
    full = DynamicCache()  # without the configuration, sliding layers keep all tokens; the mask hides those outside the window
    body = getattr(parts.model, parts.model.base_model_prefix, parts.model)
    with torch.no_grad():
        body(
            input_ids=batch.tokens[:, :earlier_width],
            attention_mask=batch.mask[:, :earlier_width],
            use_cache=True,
            **{name: full},
        )
    cached = [(cached.keys, cached.values) for cached in full.layers]
    offsets = torch.arange(width, device=device)
    index = batch.lookup[:, None] + offsets
    exists = index < batch.tokens.shape[1]
    index = index.clamp(max=batch.tokens.shape[1] - 1)
    tokens = batch.tokens.gather(1, index)
    mask = batch.mask.gather(1, index) * exists
    positions = batch.lookup[:, None] + offsets
    earlier = torch.arange(earlier_width, device=device).expand(rows, -1)
    sees_earlier = (earlier < batch.lookup[:, None])[:, None, :].expand(-1, width, -1)
    sees_own = (offsets[:, None] >= offsets)[None].expand(rows, -1, -1)
    visible = torch.cat((sees_earlier, sees_own), 2)
    attention = additive_masks(visible, positions, torch.cat((earlier, positions), 1), kinds, dtype)

    def inputs() -> dict[str, Any]:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(cached):
            cache.update(keys, values, number)
        return {"attention_mask": attention, "position_ids": positions, "use_cache": True, name: cache}

    row, place = batch.places // batch.tokens.shape[1], batch.places % batch.tokens.shape[1]
    places = row * width + place - batch.lookup[row]
    return replace(batch, tokens=tokens, mask=mask, lookup=torch.zeros_like(batch.lookup), places=places, inputs=inputs)


@contextmanager
def _from_layer(parts: Parts, layer: int, batch: Padded) -> Iterator[None]:
    """Make forward passes within the block start at `layer`, with hidden states that are computed once."""
    hidden_states: list[Tensor] = []

    def record(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise Stopped

    handle = parts.layers[layer].register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            run(parts, batch)
    finally:
        handle.remove()
    tuples = _layers_return_tuples(parts, batch)

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None, None) if tuples else hidden

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden_states[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_states[0]})

    below = list(parts.layers[:layer])
    handle = parts.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for module in below:
            module.forward = pass_through
        yield
    finally:
        handle.remove()
        for module in below:
            module.__dict__.pop("forward", None)


def _layers_return_tuples(parts: Parts, batch: Padded) -> bool:
    """Return whether a layer's forward returns a tuple instead of the hidden state alone."""
    results: list[bool] = []

    def check(_module: Any, _args: Any, output: Any) -> None:
        results.append(isinstance(output, tuple))
        raise Stopped

    with torch.no_grad(), hooked(parts.layers[0], after=check):
        run(parts, batch)
    return results[0]
