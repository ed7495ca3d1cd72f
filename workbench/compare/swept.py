"""Sweeps as recipes declare them: the fields that vary, and the configurations. It imports neither numpy nor pydantic, so that `plan` starts fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class SweepDimension:
    """A field that a sweep varies.

    Attributes:
        name: Name of the field, such as "mix.lambda".
        label: Short name, as in the names of the points.
        values: Its values, in the order of the recipe.
    """

    name: str
    label: str
    values: tuple[Value, ...]

    @property
    def seed(self) -> bool:
        """True if the field is a seed, over which scores are averaged."""
        return self.name.rpartition(".")[2] == "seed"

    @property
    def number(self) -> bool:
        """True if every value has a place on an axis: a number, or for a list of bricks their number."""
        places = [place_of(value) for value in self.values]
        return None not in places and len(set(places)) == len(places)


@dataclass(frozen=True)
class SweepPoint:
    """A configuration of a sweep.

    Attributes:
        name: Name of the configuration.
        values: Its values by the name of the field. A field that the point's method does not have is missing.
        text: The point as a recipe.
    """

    name: str
    values: Mapping[str, Value]
    text: str


@dataclass(frozen=True)
class Sweep:
    """A recipe that stands for many configurations.

    Attributes:
        name: Name of the recipe.
        dimensions: The fields that it varies.
        points: Its configurations.
    """

    name: str
    dimensions: tuple[SweepDimension, ...]
    points: tuple[SweepPoint, ...]


def place_of(value: Value | Sequence[str]) -> float | None:
    """Return the place of a value on an axis: a number itself, the number of bricks in a list; None for a word."""
    if isinstance(value, (list, tuple)):
        return float(len(value))
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
