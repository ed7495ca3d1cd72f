"""Types of recipe fields that several edit methods share: layers, and whether facts are edited at once or in batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from workbench.steps.fields import Strict, Whole


class Batches(Strict):
    """Batches of facts that are edited one after another."""

    batch: Whole = Field(ge=1)
    """Number of facts per batch, in the order of the file; the last batch may be smaller."""


class Sequential(Strict):
    """Edit batch after batch, each on the model that the earlier batches have produced."""

    sequential: Batches


def _kind(value: Any) -> str:
    return "sequential" if isinstance(value, (Mapping, Sequential)) else "joint"


Mode = Annotated[
    Annotated[Literal["joint"], Tag("joint")] | Annotated[Sequential, Tag("sequential")],
    Discriminator(_kind),
]
"""`joint`: all facts at once. `{sequential: {batch: N}}`: N facts at a time."""


Layers = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[Whole, ...], Field(min_length=1), Tag("layers")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "layers"),
]
"""Layer indices, or `auto`: the method chooses."""
