"""Penalties on a training: O-LoRA's orthogonality to other bricks, and ModuleFormer's distribution of tokens over experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.keys import Stored
from workbench.adapters.read import CONFIG, Adapter
from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import json_digest
from workbench.ground.lazy import no_grad, torch
from workbench.weights.digests import tensor_digest

if TYPE_CHECKING:
    from torch import Tensor


_PEFT = "base_model.model."
_NAME = "default"


class Orthogonal:
    """Penalty and overlap between trained A matrices and those of other bricks.

    Source: Wang et al. 2023, O-LoRA, arXiv 2310.14152, eq. 8.

    Args:
        bricks: Name -> directory of a LoRA adapter.
        model: The PEFT model in training; modules are matched by name.
        device: Device of the model.

    Raises:
        WorkbenchError: If a brick is not a LoRA adapter, shares no module with the model, or has modules of another width.
    """

    def __init__(self, bricks: Mapping[str, Path], model: Any, device: torch.device) -> None:
        trained = {
            name.removeprefix(_PEFT): module for name, module in model.named_modules() if _NAME in getattr(module, "lora_A", {})
        }
        self._pairs = {name: _shared_modules(name, path, trained, device) for name, path in bricks.items()}

    def penalty(self) -> Tensor:
        """Return Σ ‖A_i Aᵀ‖²_F over bricks i and modules, a scalar with a gradient."""
        squares = [(matrix @ _matrix_a(module).T).square().sum() for pairs in self._pairs.values() for matrix, module in pairs]
        return torch.stack(squares).sum()

    @no_grad
    def overlap(self) -> dict[str, float]:
        """Return, for each brick, the mean over shared modules of ‖A_i Aᵀ‖_F / (‖A_i‖_F ‖A‖_F).

        The value is 0 for orthogonal row spaces and at most 1.
        """
        overlaps = {}
        for name, pairs in self._pairs.items():
            parts = [
                float((matrix @ _matrix_a(module).T).norm() / (matrix.norm() * _matrix_a(module).norm()).clamp_min(1e-30))
                for matrix, module in pairs
            ]
            overlaps[name] = math.fsum(parts) / len(parts)
        return overlaps

    def digest(self) -> str:
        """Return a digest of the other bricks' matrices."""
        return json_digest([[name, [tensor_digest(matrix) for matrix, _ in pairs]] for name, pairs in self._pairs.items()])


def _matrix_a(module: Any) -> Tensor:
    """Return A of a PEFT layer, [rank, in] float32, looked up each time because loading a save may replace the parameter."""
    weight: Tensor = module.lora_A[_NAME].weight
    return weight.float()


def _shared_modules(name: str, path: Path, trained: Mapping[str, object], device: torch.device) -> list[tuple[Tensor, Any]]:
    """Return (A of the brick, trained layer) for each module that both adapt."""
    label = f"orthogonal_to: brick '{name}'"
    if not (path / CONFIG).is_file():
        raise InvalidRecipeError(f"{label}: expected a LoRA adapter, found no {CONFIG}", "List bricks that hold a LoRA adapter.")
    adapter = Adapter(path, label)
    if adapter.config["peft_type"] != "LORA":
        raise InvalidRecipeError(
            f"{label}: expected a LoRA adapter, found {adapter.config['peft_type']}", "List bricks that hold a LoRA adapter."
        )
    brick_matrices = adapter.modules()
    shared = [module for module in brick_matrices if module in trained]
    if not shared:
        raise InvalidRecipeError(
            f"{label} shares no module with the new adapter: it has {', '.join(sorted(brick_matrices)[:3]) or 'no A matrices'}, "
            f"the new adapter has {', '.join(sorted(trained)[:3])}",
            "Set `target_modules:` to modules that the bricks share, or remove the brick from `orthogonal_to:`.",
        )
    pairs = []
    for module in shared:
        entry = brick_matrices[module][0]
        width = _matrix_a(trained[module]).shape[1]
        if entry.spec.shape[1:] != (width,):
            raise InvalidRecipeError(
                f"{label}: A of {module} is {list(entry.spec.shape)}, expected [rank, {width}]",
                "The brick was trained on another base: remove it from `orthogonal_to:`.",
            )
        pairs.append((Stored(entry, module, label).read(device), trained[module]))
    return pairs


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
            self._hooks.append(model.get_submodule(name).register_forward_pre_hook(partial(self._record_logits, name)))

    def _start_pass(self, _module: Any, _args: tuple[Any, ...], arguments: dict[str, Tensor]) -> None:
        """Forget the logits of the previous forward pass, and record the attention mask of this one."""
        self._logits.clear()
        self._mask = arguments.get("attention_mask")

    def _record_logits(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        """Record the logits of one router, as a forward pre-hook."""
        # Depending on the architecture, routers return logits, scores or neither, but all compute this product first.
        self._logits[name] = args[0].flatten(0, -2).float() @ module.weight.float().T

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
