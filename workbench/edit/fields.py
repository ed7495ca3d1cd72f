"""What fields of edit methods are made of: layers, and whether facts are taken at once or batch after batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from workbench.steps.fields import Strict, Whole


class Batches(Strict):
    """Batches of a stream of facts."""

    batch: Whole = Field(ge=1)
    """Facts a batch, in the file's order; the last one may be smaller."""


class Sequential(Strict):
    """Each batch of facts on what the batches before it have made."""

    sequential: Batches


def _kind(value: Any) -> str:
    return "sequential" if isinstance(value, (Mapping, Sequential)) else "joint"


Mode = Annotated[
    Annotated[Literal["joint"], Tag("joint")] | Annotated[Sequential, Tag("sequential")],
    Discriminator(_kind),
]
"""`joint`, or `{sequential: {batch: N}}`."""


Layers = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[Whole, ...], Field(min_length=1), Tag("layers")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "layers"),
]
"""Indices of layers, or `auto`: the method's own choice."""
