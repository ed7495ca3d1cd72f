"""Recipe fields that several edit methods share: layers, and whether facts are edited at once or in batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.facts import Fact, Start, read_facts, read_stream
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


def read_for(
    mode: Literal["joint"] | Sequential, first: int | None, project: Path, file: str, start: Start | None = None
) -> list[Fact]:
    """Return the facts that a step writes, in order.

    Args:
        mode: In joint mode, facts are sorted by ID, so that the result does not depend on the order of the file. In sequential
            mode, they are the values of a `Stream`: an updated fact has several, a removed one has none.
        first: Number of rows that count; None: all.
        project: The project folder.
        file: The facts file, relative to it.
        start: The earlier stream that the file continues in sequential mode.

    Raises:
        WorkbenchError: If the file is invalid or has fewer rows than `first`, or no fact is left.
    """
    if mode == "joint":
        listed = read_facts(project / file, file)
        _check_first(first, len(listed), f"{file} has {len(listed)} facts")
        return sorted(listed[:first], key=lambda fact: fact.id)
    stream = read_stream(project / file, file, start)
    _check_first(first, len(stream.events), f"{file} has {len(stream.events)} rows")
    facts = stream.first(first).statements
    if not facts:
        raise WorkbenchError(
            f"{file}: no fact is left{f' after the first {first} rows' if first else ''}, because all are removed",
            "Add facts, or remove the step from the recipe.",
        )
    return facts


def _check_first(first: int | None, count: int, found: str) -> None:
    """Raise InvalidRecipeError if a file has fewer rows than `first`."""
    if first is not None and first > count:
        raise InvalidRecipeError(f"first is {first}, but {found}", f"Set first: {count}.")
