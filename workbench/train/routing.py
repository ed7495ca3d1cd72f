"""Losses on how a mixture's routers spread tokens over experts (Shen et al. 2023, ModuleFormer, arXiv 2306.04640)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Routing:
    """The routers of a live model in training.

    Args:
        model: A mixture of experts.
        routers: Its modules whose weight [experts, hidden] gives a token's logits.
        balance: Weight of −I(expert; token).
        concentration: Weight of H(expert).
    """

    def __init__(self, model: Any, routers: Sequence[str], balance: float, concentration: float) -> None:
        self._balance, self._concentration = balance, concentration
        self._logits: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name in routers:
            self._hooks.append(model.get_submodule(name).register_forward_pre_hook(self._reading(name)))

    def _begin(self, _module: Any, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._logits.clear()
        self._mask = given.get("attention_mask")

    def _reading(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            # Routers return logits, scores or neither, by architecture: all of them start from this product.
            self._logits[name] = args[0].flatten(0, -2).float() @ module.weight.float().T

        return hook

    def penalty(self) -> Tensor:
        """Mean over layers of `routing_loss`, of the last forward pass; padding left out."""
        real = None if self._mask is None else self._mask.flatten().bool()
        losses = [
            routing_loss((logits if real is None else logits[real]).softmax(-1), self._balance, self._concentration)
            for logits in self._logits.values()
        ]
        return torch.stack(losses).mean()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def routing_loss(probabilities: Tensor, balance: float, concentration: float) -> Tensor:
    """−b I + c H, in nats, with H = entropy of the mean distribution and I = H − mean entropy of a token's distribution.

    I is log(experts) where every token has decided and experts are used alike, 0 where all tokens have one distribution. H is 0 where
    one expert has all.

    Args:
        probabilities: [tokens, experts], a token's in a row.
    """
    mean = probabilities.mean(0)
    used = -torch.special.xlogy(mean, mean).sum()
    undecided = -torch.special.xlogy(probabilities, probabilities).sum(-1).mean()
    loss: Tensor = concentration * used - balance * (used - undecided)
    return loss
