"""Live models that edits and memories are solved on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.lazy import torch
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.resolve.resolved import Resolved
from workbench.steps import MethodContext
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs


@dataclass(frozen=True)
class LiveSession:
    """A configuration as a live model that edit and memory methods solve on.

    Attributes:
        resolved: The recipe.
        context: The live float32 model, its tokenizer, and the other data that a method may use.
        solved_on: Digest of the rounded weights and the configuration.
        tokenizer: Directory of the tokenizer.
        after: Key of the weights, which recipes with the same steps compute without reading the weights.
    """

    resolved: Resolved
    context: MethodContext
    solved_on: str
    tokenizer: Path
    after: str


def live_session(
    resolved: Resolved,
    steps: int,
    model: Model,
    device: torch.device,
    progress: Callable[[int, int, str], None],
    *,
    rounded_to: torch.dtype | None,
    seed: int | None = None,
) -> LiveSession:
    """Load a configuration as a live float32 model.

    Args:
        resolved: The recipe.
        steps: Number of its steps that have been applied to `model`.
        model: Weights and configuration.
        device: Device of the live model.
        progress: Callback that takes (done, total, text).
        rounded_to: Dtype that floating-point weights are rounded to first, as in a written model; None keeps each tensor's dtype
            on disk.
        seed: Seed of random numbers; the recipe's if omitted.
    """
    rounded = compute(model, rounded_to, device)
    digests = {name: tensor_digest(tensor) for name, tensor in rounded.items()}
    solved_on = weights_digest(output_specs(model.weights.specs, rounded_to), digests, model.config)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in rounded.items()}
    if rounded_to is not torch.float32:
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    source = resolved.tokenizer_at(steps)
    live = live_model(model.config, tensors, source, device)
    tokenizer = load_tokenizer(source)
    seed = resolved.recipe.fields.seed if seed is None else seed
    context = MethodContext(live, tokenizer, model, device, resolved.recipe.project, seed, progress, resolved.cache, digests)
    return LiveSession(resolved, context, solved_on, source, resolved.state(steps))
