"""Usage of experts: how often the routers of a live model select each expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.grow.mixtures.mixture import COUNTS
from workbench.models.texts import TextRow, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Usage:
    """The distribution of tokens over the experts of a model.

    Attributes:
        layers: Layers with experts, in ascending order.
        shares: [layers, experts], float64: the share of all selections (`top_k` per token) that an expert gets; each row adds up
            to 1. Multiplied by `top_k`, it is the share of tokens that select the expert.
        entropy: [layers], bits: entropy of the experts' mean weights over tokens, normalized to add up to 1. It is log2(experts)
            if all experts have the same weight, and 0 if one expert has all of it.
        tokens: Number of tokens, without padding.
        top_k: Number of experts that the router selects for each token.
    """

    layers: tuple[int, ...]
    shares: Tensor
    entropy: Tensor
    tokens: int
    top_k: int

    def document(self) -> dict[str, Any]:
        """Return the record of a step, which `workbench experts --json` prints, too."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "layers": list(self.layers),
            "usage": [[round(v, 4) for v in row] for row in self.shares.tolist()],
            "mean": [round(v, 4) for v in self.shares.mean(0).tolist()],
            "entropy": [round(v, 4) for v in self.entropy.tolist()],
        }


@torch.no_grad()
def usage(
    model: PreTrainedModel, rows: Sequence[TextRow], device: torch.device, progress: Callable[[int, int], None] = lambda *_: None
) -> Usage:
    """Count how often each expert is selected on some texts.

    The counts come from the model's own forward pass, after correction biases and groups.

    Args:
        model: The live model.
        rows: The texts as tokens.
        device: Device of the model.
        progress: Function that is called with (number of texts done, number of texts).

    Raises:
        WorkbenchError: If the model has no experts, or its experts do not receive (tokens, numbers, weights).
    """
    modules = expert_modules(model)
    counts = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    weights = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    tokens, done, top_k = 0, 0, 1
    for batch in batches(rows, device):
        with chosen(model, list(modules)) as selected:
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        real = batch.mask.flatten().bool()
        if unseen := [name for name, (index, _) in selected.items() if index.numel() % len(real)] or sorted(
            modules.keys() - selected.keys()
        ):
            raise _unread(unseen[0], model)
        for name, (index, weight) in selected.items():
            count = modules[name][1]
            numbers, factors = (t.reshape(len(real), -1)[real].flatten().cpu() for t in (index, weight))
            top_k = len(numbers) // int(real.sum())
            real_experts = numbers < count  # higher numbers are experts that compute nothing
            counts[name] += torch.bincount(numbers[real_experts], minlength=count).double()
            weights[name].index_add_(0, numbers[real_experts], factors[real_experts].double())
        tokens, done = tokens + int(real.sum()), done + len(batch.tokens)
        progress(done, len(rows))
    order = sorted(modules, key=lambda name: modules[name][0])
    shares, mean = (torch.stack([sums[n] / sums[n].sum().clamp_min(1e-30) for n in order]) for sums in (counts, weights))
    entropy = -(mean * mean.clamp_min(1e-30).log2()).sum(1)
    return Usage(tuple(modules[n][0] for n in order), shares, entropy.clamp_min(0), tokens, top_k)


def expert_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the modules of experts, each with its layer and its number of experts.

    Raises:
        WorkbenchError: If the model has no experts, several mixtures in a layer, or layers with different numbers of experts.
    """
    config: Any = model.config.get_text_config()
    kind = config.model_type
    modules: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        count = next((n for f in COUNTS for n in [getattr(module, f, None) or getattr(config, f, None)] if n), None)
        if name.endswith(".experts") and layer and count:
            modules[name] = int(layer[1]), int(count)
    if not modules:
        raise InvalidRecipeError(
            f"model_type {kind} has no experts: no layer is a mixture", "`grow: experts` turns a dense model into a mixture."
        )
    if len({count for _, count in modules.values()}) > 1 or len({layer for layer, _ in modules.values()}) < len(modules):
        raise InvalidRecipeError(
            f"model_type {kind}: layers with several mixtures, or with different numbers of experts, are not supported"
        )
    return modules


@contextmanager
def chosen(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the selected experts inside the block: module of experts -> (numbers, weights), each [tokens, top_k]."""
    selected: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            handed = [*args, *given.values()]
            if len(handed) != 3 or handed[1].is_floating_point() or handed[1].shape != handed[2].shape:
                raise _unread(name, model)
            selected[name] = handed[1], handed[2]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True) for name in modules]
    try:
        yield selected
    finally:
        for hook in hooks:
            hook.remove()


def _unread(name: str, model: PreTrainedModel) -> WorkbenchError:
    return InvalidRecipeError(
        f"{name}: the experts of model_type {model.config.model_type} do not receive (tokens, numbers, weights), so the router's "
        "choice cannot be read",
        "Report this architecture.",
    )
