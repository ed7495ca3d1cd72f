"""Shapes and dtypes of a recipe's result, and of the models that its steps read, from file headers."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.kind import kind_of
from workbench.weights.specs import TensorSpec
from workbench.weights.writer import output_specs


def written_specs(resolved: Resolved) -> dict[str, TensorSpec]:
    """Return the shapes and dtypes of the configuration as a checkpoint, from headers: only growth changes shapes."""
    return output_specs(specs_before(resolved, len(resolved.recipe.steps)), resolved.dtype_name)


def specs_before(resolved: Resolved, steps: int) -> Mapping[str, TensorSpec]:
    """Return the shapes after the first `steps` steps, from headers.

    Args:
        resolved: The recipe.
        steps: Number of steps.
    """
    return shapes_before(resolved, steps).weights.specs


def shapes_before(resolved: Resolved, steps: int) -> Model:
    """Return names, shapes and configuration after the first `steps` steps, from headers.

    Args:
        resolved: The recipe.
        steps: Number of steps.
    """
    model = resolved.base
    for step in resolved.recipe.steps[:steps]:
        model = kind_of(step).shapes(step, resolved, model)
    return model


def shapes_of_brick(resolved: Resolved, name: str) -> Model:
    """Return names, shapes and configuration of a brick's whole model, from headers.

    Args:
        resolved: The recipe.
        name: The brick.
    """
    if name in resolved.nested:
        nested = resolved.nested[name]
        return shapes_before(nested, len(nested.recipe.steps))
    brick = resolved.on_disk[name]
    if brick.kind == "adapter":
        return resolved.base
    if brick.part:
        return Model(brick.whole, brick.whole.config)
    return Model(resolved.vocabulary.view(name) if resolved.vocabulary else brick.checkpoint, brick.checkpoint.config)
