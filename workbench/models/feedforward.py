"""Feed-forward output projections of a live model, found from what a forward pass runs.

The input of this projection is the vector of neuron activations in every plain and gated feed-forward layer:
FFN(x) = W_out a + b with a = σ(W x + b) or a = σ(W_gate x) ⊙ (W_up x).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.models.architecture import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = re.compile(r"att(n|ention)")


def is_attention(module: str) -> bool:
    """Return whether a module, by its name inside a layer, belongs to the attention."""
    return bool(_ATTENTION.search(module))


def output_projections(model: PreTrainedModel, prefix: str, layers: Sequence[int], device: torch.device) -> dict[int, str]:
    """Find the feed-forward output projection of each layer.

    It is the last linear module outside the attention that a one-token forward pass runs and whose output is as wide as the hidden
    state.

    Args:
        model: The live model.
        prefix: Live name of the list of decoder layers: "model.layers".
        layers: Layers to search.
        device: Device of the model.

    Returns:
        Layer -> live name of the module. Layers without such a module are left out.
    """
    stack = model.get_submodule(prefix)
    assert isinstance(stack, torch.nn.ModuleList)
    ran = _linear_modules_run(model, stack, device)
    width = hidden_width(model)
    names = {id(m): name for name, m in model.named_modules()}
    modules: dict[int, str] = {}
    for number in layers:
        projections = [
            m for m in ran[number] if n_outputs(m) == width and not is_attention(names[id(m)].removeprefix(f"{prefix}."))
        ]
        if projections:
            modules[number] = names[id(projections[-1])]
    return modules


def feed_forward_mixers(layers: torch.nn.ModuleList) -> list[int]:
    """Return the feed-forward layers of a model whose layers are one mixer each (Nemotron-H); empty for other models.

    Each layer of such a model is an attention, a state-space model, a set of experts or a feed-forward part.
    """
    mixers = [getattr(layer, "mixer", None) for layer in layers]
    if any(mixer is None for mixer in mixers) or not any(hasattr(mixer, "q_proj") for mixer in mixers):
        return []
    return [number for number, mixer in enumerate(mixers) if isinstance(getattr(mixer, "down_proj", None), torch.nn.Linear)]


def hidden_width(model: PreTrainedModel) -> int:
    """Return the width of the hidden state."""
    if hasattr(model.config, "hidden_size"):
        return int(model.config.hidden_size)
    return int(model.get_input_embeddings().weight.shape[1])


def n_outputs(module: torch.nn.Module) -> int | None:
    """Return the number of outputs of a linear module; None for other modules."""
    if isinstance(module, torch.nn.Linear):
        return int(module.weight.shape[0])
    weight = getattr(module, "weight", None)
    return int(weight.shape[1]) if is_conv1d(module) and isinstance(weight, torch.Tensor) else None


def _linear_modules_run(model: PreTrainedModel, layers: torch.nn.ModuleList, device: torch.device) -> list[list[torch.nn.Module]]:
    """Return the linear modules of every layer in the order in which a one-token forward pass runs them."""
    ran: list[list[torch.nn.Module]] = [[] for _ in layers]
    handles = []
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if n_outputs(module) is not None:
                handles.append(module.register_forward_hook(lambda m, _args, _out, number=number: ran[number].append(m)))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran
