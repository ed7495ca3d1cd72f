"""Model merging, updating and growing as declarative, exact, scored recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.api.loading import LoadedRecipe, load, load_recipe, load_tokenizer
    from workbench.api.neurons import Neurons
    from workbench.ground.errors import WorkbenchError

__all__ = ["LoadedRecipe", "Neurons", "WorkbenchError", "load", "load_recipe", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `workbench --help` does not import torch."""
    if name in ("LoadedRecipe", "load", "load_recipe", "load_tokenizer"):
        from workbench.api import loading

        return getattr(loading, name)
    if name == "Neurons":
        from workbench.api.neurons import Neurons

        return Neurons
    if name == "WorkbenchError":
        from workbench.ground.errors import WorkbenchError

        return WorkbenchError
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
