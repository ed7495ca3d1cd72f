"""Live module names and adapter keys to the tensor names that a base has on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_head_module
from workbench.weights.specs import TensorSpec

_ROOTS = ("model.", "transformer.", "gpt_neox.", "language_model.")


def disk_weight(module: str, specs: Mapping[str, TensorSpec], label: str) -> str:
    """The base's name of a live module's weight.

    A base saved without its head, or wrapped in a larger model, has its root prefix missing or added on disk.

    Args:
        module: A module name of the live model: "model.layers.0.self_attn.q_proj".
        specs: The base's tensors.
        label: How errors call the owner of the module name.
    """
    name = f"{module}.weight"
    found = next((c for c in with_and_without_root(name) if c in specs), None)
    if found is None:
        hint = "The adapter was trained on another architecture: name its own base in the recipe."
        if is_head_module(module):
            hint = "The base ties its head to its embeddings, and an update of the head alone would untie them: train the adapter without it."
        raise WorkbenchError(f"{label}: module {module} has no weight in the base.{nearest_name(name, specs)}", hint)
    return found


def live_module(weight: str, modules: Collection[str]) -> str:
    """The live model's module that a weight on disk belongs to: the inverse of `disk_weight`.

    Args:
        weight: A tensor name on disk: "h.0.mlp.c_proj.weight".
        modules: Module names of the live model.
    """
    name = weight.removesuffix(".weight")
    found = next((c for c in with_and_without_root(name) if c in modules), None)
    if found is None:
        raise WorkbenchError(
            f"{weight}: the live model has no module {name}.{nearest_name(name, modules)}",
            "transformers renames or fuses this architecture's weights, which is not supported here.",
        )
    return found


def counterpart(name: str, known: Collection[str]) -> str | None:
    """The name itself among `known`, or with its root prefix missing or added; None where neither is."""
    return next((c for c in with_and_without_root(name) if c in known), None)


def nearest_name(name: str, known: Collection[str]) -> str:
    """The nearest name, but no list of hundreds where none is near."""
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else ""


def with_and_without_root(name: str) -> Iterator[str]:
    """A name, then with its root prefix left out, then with every known one added."""
    yield name
    yield from (name.removeprefix(root) for root in _ROOTS if name.startswith(root))
    yield from (root + name for root in _ROOTS)
