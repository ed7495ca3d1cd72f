"""Recipes with `output: {form: adapter}` as bricks that act beside the weights: their adapters, written once into the cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.bind import bind
from workbench.adapters.linear import not_linear
from workbench.adapters.read import CONFIG, Adapter
from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.lazy import torch
from workbench.manifest import publish_sealed, reusable
from workbench.models.identity import computed_on
from workbench.resolve.adapter_form import adapt
from workbench.weights.device import default_threads

if TYPE_CHECKING:
    from workbench.models.layout import Model
    from workbench.resolve.resolved import Resolved


def cached_adapter(resolved: Resolved, name: str, device: torch.device | None = None) -> Adapter | None:
    """Return the adapter of a recipe from the cache; None if it has not been written yet.

    Args:
        resolved: The recipe.
        name: Name of the brick in the recipe that uses it, for messages.
        device: The device that computes it; None stands for the one that `--device auto` picks.
    """
    place = _place(resolved, device)
    return Adapter(place, f"brick '{name}'") if reusable(place, CONFIG) else None


def written_adapter(resolved: Resolved, name: str, composed: Model, device: torch.device) -> Adapter:
    """Write the adapter of a recipe into the cache, and return it.

    Args:
        resolved: The recipe, whose output is an adapter.
        name: Name of the brick in the recipe that uses it, for messages.
        composed: Weights and configuration of the recipe's result.
        device: Device that computes the factors.

    Raises:
        WorkbenchError: If the result is no low-rank update of linear layers, or an input has changed.
    """
    from workbench.adapters.export import write_result

    place, output = _place(resolved, device), resolved.recipe.fields.output
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".writing-") as folder:
        partial = Path(folder) / "adapter"
        write_result(
            adapt(composed, resolved.base, output),
            partial,
            resolved.recipe.fields.base_name,
            device=device,
            threads=default_threads(),
            dtype=getattr(torch, output.dtype) if output.dtype else None,
        )
        adapter = Adapter(partial, f"brick '{name}'")
        if found := not_linear(adapter, bind(adapter, resolved.plain.weights.specs, resolved.plain)):
            raise WorkbenchError(
                f"brick '{name}': the result of recipe {resolved.recipe.name} has {found}, but only plain LoRA on linear layers can act "
                "beside the weights",
                "Leave such tensors out with `where` in the steps of that recipe, or merge adapters of linear layers only.",
            )
        resolved.check_inputs()
        publish_sealed(partial, place)
    return Adapter(place, f"brick '{name}'")


def _place(resolved: Resolved, device: torch.device | None) -> Path:
    """Return the directory of a recipe's adapter in the cache, which a device computes."""
    return resolved.cache / "adapters" / json_digest([resolved.key, computed_on(device)])
