"""Usage of experts: how often the routers of a live model select each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.lazy import no_grad, torch
from workbench.models.experts import chosen, expert_modules, unread
from workbench.models.texts import TextRow, batches
from workbench.results import Number, Result

if TYPE_CHECKING:
    from torch import Tensor
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


class ExpertsResult(Result):
    """Use of the experts of a mixture on some texts."""

    model: str
    """Recipe, run or model directory, as named on the command line."""
    texts: str
    """File of the texts."""
    samples: int
    """Number of texts that were read."""
    tokens: int
    """Number of tokens."""
    top_k: int
    """Number of experts that the router selects for each token."""
    layers: list[int]
    """Layers with experts, in ascending order."""
    usage: list[list[Number]]
    """By layer, share of all selections that each expert gets; a row adds up to 1."""
    mean: list[Number]
    """Mean share of each expert over the layers."""
    entropy: list[Number]
    """By layer, entropy of the experts' mean weights in bits."""


@no_grad
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
        is_token = batch.mask.flatten().bool()
        if unseen := [name for name, (index, _) in selected.items() if index.numel() % len(is_token)] or sorted(
            modules.keys() - selected.keys()
        ):
            raise unread(unseen[0], model)
        for name, (index, weight) in selected.items():
            count = modules[name][1]
            numbers, factors = (t.reshape(len(is_token), -1)[is_token].flatten().cpu() for t in (index, weight))
            top_k = len(numbers) // int(is_token.sum())
            existing = numbers < count  # higher numbers are experts that compute nothing
            counts[name] += torch.bincount(numbers[existing], minlength=count).double()
            weights[name].index_add_(0, numbers[existing], factors[existing].double())
        tokens, done = tokens + int(is_token.sum()), done + len(batch.tokens)
        progress(done, len(rows))
    order = sorted(modules, key=lambda name: modules[name][0])
    shares, mean = (torch.stack([sums[n] / sums[n].sum().clamp_min(1e-30) for n in order]) for sums in (counts, weights))
    entropy = -(mean * mean.clamp_min(1e-30).log2()).sum(1)
    return Usage(tuple(modules[n][0] for n in order), shares, entropy.clamp_min(0), tokens, top_k)
