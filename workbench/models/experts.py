"""Modules of experts in a live model, and the router's choice that they receive."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import EXPERT_COUNTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def has_experts(model: PreTrainedModel) -> bool:
    """Return True if a layer of the model sends tokens to experts."""
    return bool(_candidates(model))


def expert_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the modules of experts, each with its layer and its number of experts.

    Raises:
        WorkbenchError: If the model has no experts, several mixtures in a layer, or layers with different numbers of experts.
    """
    modules, kind = _candidates(model), model.config.get_text_config().model_type
    if not modules:
        raise WorkbenchError(
            f"model_type {kind} has no experts: no layer is a mixture", "`grow: experts` turns a dense model into a mixture.", 2
        )
    if len({count for _, count in modules.values()}) > 1 or len({layer for layer, _ in modules.values()}) < len(modules):
        raise WorkbenchError(
            f"model_type {kind}: layers with several mixtures, or with different numbers of experts, are not supported", None, 2
        )
    return modules


def _candidates(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return module of experts -> (layer, number of experts)."""
    config: Any = model.config.get_text_config()
    modules: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        count = next((n for f in EXPERT_COUNTS for n in [getattr(module, f, None) or getattr(config, f, None)] if n), None)
        if name.endswith(".experts") and layer and count:
            modules[name] = int(layer[1]), int(count)
    return modules


@contextmanager
def chosen(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the selected experts inside the block: module of experts -> (numbers, weights), each [tokens, top_k]."""
    selected: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            handed = [*args, *given.values()]
            if len(handed) != 3 or handed[1].is_floating_point() or handed[1].shape != handed[2].shape:
                raise unread(name, model)
            selected[name] = handed[1], handed[2]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True) for name in modules]
    try:
        yield selected
    finally:
        for hook in hooks:
            hook.remove()


def unread(name: str, model: PreTrainedModel) -> WorkbenchError:
    """Return the error for experts that do not receive the router's choice."""
    return WorkbenchError(
        f"{name}: the experts of model_type {model.config.model_type} do not receive (tokens, numbers, weights), so the router's "
        "choice cannot be read",
        "Report this architecture.",
        2,
    )
