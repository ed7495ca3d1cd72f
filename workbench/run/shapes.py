"""Shapes and dtypes of a recipe's result, from file headers."""

from __future__ import annotations

from collections.abc import Mapping

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
    model = resolved.base
    for step in resolved.recipe.steps[:steps]:
        model = kind_of(step).shapes(step, model, resolved.base)
    return model.weights.specs
