"""Shapes and dtypes of a recipe's result, from file headers."""

from __future__ import annotations

from workbench.resolve.resolved import Resolved
from workbench.run.kind import kind_of
from workbench.weights.specs import TensorSpec
from workbench.weights.writer import output_specs


def written_specs(resolved: Resolved) -> dict[str, TensorSpec]:
    """Return the shapes and dtypes of the configuration as a checkpoint, from headers: only growth changes shapes."""
    model = resolved.base
    for step in resolved.recipe.steps:
        model = kind_of(step).shapes(step, model, resolved.base)
    return output_specs(model.weights.specs, resolved.dtype_name)
