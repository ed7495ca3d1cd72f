"""Loss on the distribution of tokens over experts by a mixture's routers (Shen et al. 2023, ModuleFormer, arXiv 2306.04640)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Routing:
    """Recorder of the router logits of a live model in training.

    Args:
        model: A mixture of experts.
        routers: Names of its router modules, whose weight [experts, hidden] computes a token's logits.
        balance: Weight of −I(expert; token).
        concentration: Weight of H(expert).
    """

    def __init__(self, model: Any, routers: Sequence[str], balance: float, concentration: float) -> None:
        self._balance, self._concentration = balance, concentration
        self._logits: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._hooks = [model.register_forward_pre_hook(self._start_pass, with_kwargs=True)]
        for name in routers:
            self._hooks.append(model.get_submodule(name).register_forward_pre_hook(self._logit_hook(name)))

    def _start_pass(self, _module: Any, _args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Forget the logits of the previous forward pass, and record the attention mask of this one."""
        self._logits.clear()
        self._mask = arguments.get("attention_mask")

    def _logit_hook(self, name: str) -> Any:
        """Return a forward pre-hook that records the logits of one router."""

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            # Depending on the architecture, routers return logits, scores or neither, but all compute this product first.
            self._logits[name] = args[0].flatten(0, -2).float() @ module.weight.float().T

        return hook

    def penalty(self) -> Tensor:
        """Return the mean of `routing_loss` over layers in the last forward pass, ignoring padding."""
        is_token = None if self._mask is None else self._mask.flatten().bool()
        losses = [
            routing_loss((logits if is_token is None else logits[is_token]).softmax(-1), self._balance, self._concentration)
            for logits in self._logits.values()
        ]
        return torch.stack(losses).mean()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


def routing_loss(probabilities: Tensor, balance: float, concentration: float) -> Tensor:
    """Return −b I + c H in nats, with weights b (balance) and c (concentration).

    H is the entropy of the mean distribution over experts, and I = H − mean entropy of a token's distribution. I is
    log(experts) if every token uses one expert and all experts are used equally, and 0 if all tokens have the same
    distribution. H is 0 if one expert receives all tokens.

    Args:
        probabilities: Distribution of each token over the experts, [tokens, experts].
        balance: Weight b.
        concentration: Weight c.
    """
    mean = probabilities.mean(0)
    used = -torch.special.xlogy(mean, mean).sum()
    undecided = -torch.special.xlogy(probabilities, probabilities).sum(-1).mean()
    loss: Tensor = concentration * used - balance * (used - undecided)
    return loss
