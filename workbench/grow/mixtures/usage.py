"""Which experts tokens take, counted on a live model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.grow.mixtures.mixture import COUNTS
from workbench.models.texts import TextRow, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Usage:
    """How the routers of a model spread tokens over experts.

    Attributes:
        layers: Layers with experts, ascending.
        shares: [layers, experts], float64: of the places that tokens have (top_k each), the share that an expert gets; a row adds up to 1.
            Times `top_k` it is the share of tokens that take the expert.
        entropy: [layers], bits: of the mean over tokens of the weights that experts' outputs are multiplied by, made to add up to one.
            log2(experts) where all count alike, 0 where one does all.
        tokens: How many were counted, padding left out.
        top_k: How many experts a token takes.
    """

    layers: tuple[int, ...]
    shares: Tensor
    entropy: Tensor
    tokens: int
    top_k: int

    def document(self) -> dict[str, Any]:
        """What a step records and `workbench experts --json` prints."""
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
    """Count the experts that each token of some texts takes.

    The counts are of the experts that the model hands tokens to, after correction biases and groups; nothing is routed anew.

    Args:
        progress: (texts done, texts)

    Errors: a model without experts, or whose experts are not handed (tokens, numbers, weights).
    """
    modules = expert_modules(model)
    counts = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    weights = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    tokens, done, top_k = 0, 0, 1
    for batch in batches(rows, device):
        with chosen(model, list(modules)) as seen:
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        real = batch.mask.flatten().bool()
        if unseen := [name for name, (index, _) in seen.items() if index.numel() % len(real)] or sorted(
            modules.keys() - seen.keys()
        ):
            raise _unread(unseen[0], model)
        for name, (index, weight) in seen.items():
            count = modules[name][1]
            taken, given = (t.reshape(len(real), -1)[real].flatten().cpu() for t in (index, weight))
            top_k = len(taken) // int(real.sum())
            known = taken < count  # beyond them: experts that compute nothing
            counts[name] += torch.bincount(taken[known], minlength=count).double()
            weights[name].index_add_(0, taken[known], given[known].double())
        tokens, done = tokens + int(real.sum()), done + len(batch.tokens)
        progress(done, len(rows))
    order = sorted(modules, key=lambda name: modules[name][0])
    shares, mean = (torch.stack([found[n] / found[n].sum().clamp_min(1e-30) for n in order]) for found in (counts, weights))
    entropy = -(mean * mean.clamp_min(1e-30).log2()).sum(1)
    return Usage(tuple(modules[n][0] for n in order), shares, entropy.clamp_min(0), tokens, top_k)


def expert_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Module that holds a layer's experts -> (layer, number of experts). Errors: a model without experts, layers of different numbers."""
    config: Any = model.config.get_text_config()
    kind = config.model_type
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        count = next((n for f in COUNTS for n in [getattr(module, f, None) or getattr(config, f, None)] if n), None)
        if name.endswith(".experts") and layer and count:
            found[name] = int(layer[1]), int(count)
    if not found:
        raise WorkbenchError(
            f"model_type {kind} has no experts: no layer is a mixture", "`grow: experts` makes a dense model one.", 2
        )
    if len({count for _, count in found.values()}) > 1 or len({layer for layer, _ in found.values()}) < len(found):
        raise WorkbenchError(f"model_type {kind}: layers with several mixtures, or of different sizes, are not counted", None, 2)
    return found


@contextmanager
def chosen(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While this is open: module of experts -> (numbers, weights) of the experts that tokens take, each [tokens, top_k]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            handed = [*args, *given.values()]
            if len(handed) != 3 or handed[1].is_floating_point() or handed[1].shape != handed[2].shape:
                raise _unread(name, model)
            seen[name] = handed[1], handed[2]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True) for name in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _unread(name: str, model: PreTrainedModel) -> WorkbenchError:
    return WorkbenchError(
        f"{name}: model_type {model.config.model_type} does not hand its experts (tokens, numbers, weights), so that "
        "what the router chooses cannot be read",
        "Report this architecture.",
        2,
    )
