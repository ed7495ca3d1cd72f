"""Translation between module names of live models and tensor names on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_head_module
from workbench.weights.specs import TensorSpec

_ROOTS = ("model.", "transformer.", "gpt_neox.", "language_model.")


def disk_weight(module: str, specs: Mapping[str, TensorSpec], label: str) -> str:
    """Return the name on disk of a live module's weight.

    The names of a base that was saved without its head, or inside a larger model, lack a root prefix or have another one.

    Args:
        module: A module name of the live model: "model.layers.0.self_attn.q_proj".
        specs: The base's tensors.
        label: The owner of the module name in messages.

    Raises:
        WorkbenchError: If the base has no such weight.
    """
    name = f"{module}.weight"
    stored = counterpart(name, specs)
    if stored is None:
        hint = "The adapter was trained on another architecture: use its own base in the recipe."
        if is_head_module(module):
            hint = "The base ties its head to its embeddings, and an update of the head alone would untie them: train the adapter without the head."
        raise WorkbenchError(f"{label}: module {module} has no weight in the base.{nearest_name(name, specs)}", hint)
    return stored


def live_module(weight: str, modules: Collection[str]) -> str:
    """Return the live model's module that a weight on disk belongs to; the inverse of `disk_weight`.

    Args:
        weight: A tensor name on disk: "h.0.mlp.c_proj.weight".
        modules: Module names of the live model.

    Raises:
        WorkbenchError: If the model has no such module.
    """
    name = weight.removesuffix(".weight")
    module = counterpart(name, modules)
    if module is None:
        raise WorkbenchError(
            f"{weight}: the live model has no module {name}.{nearest_name(name, modules)}",
            "transformers renames or fuses this architecture's weights, which is not supported here.",
        )
    return module


def counterpart(name: str, known: Collection[str]) -> str | None:
    """Return the name among `known` that equals a name with or without a root prefix; None if there is none."""
    return next((c for c in with_and_without_root(name) if c in known), None)


def nearest_name(name: str, known: Collection[str]) -> str:
    """Return a "Did you mean" sentence with a leading space if a known name is similar, else an empty text."""
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else ""


def with_and_without_root(name: str) -> Iterator[str]:
    """Yield a name, then the name without its root prefix, then the name with each known root prefix added."""
    yield name
    yield from (name.removeprefix(root) for root in _ROOTS if name.startswith(root))
    yield from (root + name for root in _ROOTS)
