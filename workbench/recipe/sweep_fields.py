"""The field `sweep` of a recipe: values of other fields, each combination of which is a configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from workbench.recipe.search_fields import Value

SweepValue = Value | tuple[str, ...]


def same(a: SweepValue, b: SweepValue) -> bool:
    """Return True if two values are the same in a recipe: 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _distinct(values: tuple[SweepValue, ...]) -> tuple[SweepValue, ...]:
    for i, value in enumerate(values):
        if any(same(value, other) for other in values[:i]):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"expected values that differ, found {shown} twice")
    if len(values) < 2:
        raise ValueError(f"expected at least two values, found {len(values)}; write a single value into the step itself")
    return values


SweepValues = Annotated[tuple[SweepValue, ...], Field(min_length=1), AfterValidator(_distinct)]
"""Values of one dimension: numbers, words or, for a step's `bricks`, lists of names."""
