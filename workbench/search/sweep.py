"""Sweeps: the configurations that a recipe with a `sweep` stands for, one for each combination of values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workbench import yamldoc
from workbench.compare.leaders import MOST_MEMBERS
from workbench.compare.sweeps import Sweep, SweepDimension, SweepPoint, Value
from workbench.errors import UsageError, WorkbenchError, nearest
from workbench.recipe.recipe import Recipe
from workbench.recipe.sweep_fields import SweepValues
from workbench.search.space import Dimension, FieldSpace

MOST_POINTS = MOST_MEMBERS - 1
"""Points of a sweep that are scored without being asked for: as many as the recommendation tests against each other."""
_COUNTED = 100_000  # a larger product is refused without counting the points that are the same
_LONGEST = 180  # letters of a point's name, which is also that of a folder
_WORD = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class _Domain:
    """Values of a dimension, as a search's choices."""

    choices: tuple[Value, ...]


class _Swept(FieldSpace):
    """The dimensions of a sweep.

    Args:
        recipe: The recipe.
        domains: Names of fields -> values.
        asked: Names of fields that `--sweep` gives, for errors.

    Raises:
        WorkbenchError: If a step or field does not exist or does not accept a value, or two dimensions are the same field.
    """

    place = ("sweep",)

    def __init__(self, recipe: Recipe, domains: Mapping[str, tuple[Value, ...]], asked: frozenset[str]) -> None:
        self.asked, self.domains = asked, domains
        named = replace(recipe, fields=recipe.fields.model_copy(update={"name": recipe.fields.name or "sweep"}), point="")
        super().__init__(named, {name: _Domain(values) for name, values in domains.items()})
        for a, b in combinations(self.dimensions, 2):
            short, long = sorted((a, b), key=lambda d: len(d.path))
            if short.step == long.step and long.path[: len(short.path)] == short.path:
                relation = "are the same field" if len(short.path) == len(long.path) else "overlap: one field holds the other"
                raise self._error(long.name, f"'{short.name}' and '{long.name}' {relation}", "Remove one of them.")

    @property
    def in_order(self) -> list[Dimension]:
        """The dimensions in the order of the recipe, which is that of the names."""
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        return [by_name[name] for name in self.domains]

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield the values of each point, without fields that its methods do not have; each combination once."""
        existing: dict[tuple[Any, ...], list[str]] = {}
        seen = set()
        for values in product(*self.domains.values()):
            point: dict[str, Any] = dict(zip(self.domains, values, strict=True))
            chosen = tuple(point[d.name] for d in self.dimensions if d.chooses_method)
            if chosen not in existing:
                existing[chosen] = [d.name for d in self.active(point)]
            point = {name: value for name, value in point.items() if name in existing[chosen]}
            key = tuple(point.items())
            if key not in seen:
                seen.add(key)
                yield point

    def _error(self, name: str, message: str, hint: str | None = None) -> WorkbenchError:
        if name in self.asked:
            return UsageError(f"--sweep {name}: {message}", hint)
        return super()._error(name, message, hint)


@dataclass(frozen=True)
class Expanded:
    """The configurations of a recipe: itself, or the points of its sweep.

    Attributes:
        recipes: The recipes, none of which has a sweep.
        sweep: The sweep with the names of its points; None if the recipe has none.
    """

    recipes: tuple[Recipe, ...]
    sweep: Sweep | None = None


def expand(recipe: Recipe, asked: Sequence[str] = (), most: int | None = None) -> Expanded:
    """Return the configurations of a recipe.

    Args:
        recipe: The recipe. A field that `--set` changed is fixed, and no dimension of its sweep.
        asked: Values of `--sweep`, such as "mix.lambda=0.25,0.5,1", in addition to the recipe's own dimensions or instead of them.
        most: Largest number of points; default: 64.

    Raises:
        WorkbenchError: If a dimension does not exist, a field does not accept a value, a dimension is listed twice, or there are too many points.
    """
    domains, wanted = _domains(recipe, asked)
    plain = replace(recipe, fields=recipe.fields.model_copy(update={"sweep": None}))
    if not domains:
        return Expanded((plain,))
    if plain.fields.search is not None:
        raise UsageError(
            f"--sweep: recipe {recipe.name} has a `search`, and a recipe has one of the two", "Remove `search`, or --sweep."
        )
    _few_enough(recipe, prod(map(len, domains.values())), most, _COUNTED)
    swept = _Swept(plain, domains, wanted)
    combined = list(swept.combinations())
    _few_enough(recipe, len(combined), most)
    labels = _labels(swept.in_order)
    words = {name: _words(values) for name, values in domains.items()}
    recipes: list[Recipe] = []
    points: list[SweepPoint] = []
    for values in combined:
        parts = [_part(labels[name], words[name][domains[name].index(value)]) for name, value in values.items()]
        suffix = f"[{','.join(parts)}]"
        if len(recipe.name + suffix) > _LONGEST:
            text = f"recipe {recipe.name}: the name of a point has {len(recipe.name + suffix)} letters, at most {_LONGEST} are possible"
            raise UsageError(f"{text}: {recipe.name}{suffix[:60]}…", "Sweep fewer fields, or shorter values.")
        data = json.loads(json.dumps(swept.document(values)))
        if recipe.fields.name is None:
            data.pop("name")
        settings = [f"{name}={_flow(value)}" for name, value in values.items()]
        try:
            recipes.append(plain.varied(data, recipe.point + suffix, settings))
        except WorkbenchError as error:
            raise error.reworded(f"sweep point {recipe.name}{suffix}: {error.message}", error.hint) from error
        points.append(SweepPoint(recipe.name + suffix, values, yamldoc.dump(data)))
    dimensions = tuple(SweepDimension(name, labels[name] or name.rpartition(".")[2], values) for name, values in domains.items())
    return Expanded(tuple(recipes), Sweep(recipe.name, dimensions, tuple(points)))


def point_of(recipe: Recipe, point: str) -> Recipe:
    """Return a point of a recipe's sweep.

    Args:
        recipe: The recipe with the sweep.
        point: End of the point's name, such as "[lambda=0.5,ties]".

    Raises:
        WorkbenchError: If the recipe has no sweep, or the sweep no such point.
    """
    if recipe.fields.sweep is None:
        raise UsageError(
            f"'{recipe.name}{point}': recipe {recipe.name} has no `sweep`, and so no points", "Name the recipe alone."
        )
    points = expand(recipe, most=_COUNTED).recipes
    found = next((one for one in points if one.point == point), None)
    if found is None:
        near = nearest(recipe.name + point, [one.name for one in points])
        raise UsageError(f"'{recipe.name}{point}': the sweep of {recipe.name} has no such point. {near}")
    return found


def _domains(recipe: Recipe, asked: Sequence[str]) -> tuple[dict[str, tuple[Value, ...]], frozenset[str]]:
    """Return the values of each dimension, and the names of those that `--sweep` gives."""
    given: dict[str, tuple[Value, ...]] = {}
    for text in asked:
        name, values = _read(text)
        if name in given:
            raise UsageError(f"--sweep {name}: given twice", f"Write all values into one: --sweep {name}=VALUE,VALUE,…")
        given[name] = values
    space = _Swept(replace(recipe, fields=recipe.fields.model_copy(update={"sweep": None})), {}, frozenset(given))
    places = {_place(space.located(name)): name for name in given}
    fixed = {place: key for key in (s.partition("=")[0] for s in recipe.settings) if (place := _written_place(space, key))}
    for place, name in places.items():
        if place in fixed:
            raise UsageError(f"--sweep {name}: --set {fixed[place]} sets the same field", "Remove one of them.")
    own = {
        name: values
        for name, values in (recipe.fields.sweep or {}).items()
        if (place := _place(space.located(name))) not in places and place not in fixed
    }
    return {**own, **given}, frozenset(given)


def _place(dimension: Dimension) -> tuple[Any, ...]:
    return (dimension.step, dimension.path)


def _written_place(space: FieldSpace, name: str) -> tuple[Any, ...] | None:
    """Return the place of a field that `--set` names; None if it cannot be swept."""
    try:
        return _place(space.located(name))
    except WorkbenchError:
        return None


def _read(text: str) -> tuple[str, tuple[Value, ...]]:
    """Read a value of `--sweep`."""
    name, equals, listed = text.partition("=")
    if not equals or not name or not listed.strip():
        raise UsageError(f"--sweep {text}: expected STEP.FIELD=VALUE,VALUE,…", "Example: --sweep mix.lambda=0.25,0.5,1")
    data = yamldoc.parse(f"[{listed}]", f"--sweep {name}").data
    try:
        return name, TypeAdapter(SweepValues).validate_python(tuple(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            message = "expected numbers, words, or lists of names such as [a,b]"
        raise UsageError(f"--sweep {text}: {message}", "Example: --sweep mix.lambda=0.25,0.5,1") from None


def _few_enough(recipe: Recipe, count: int, most: int | None, slack: int = 0) -> None:
    limit = MOST_POINTS if most is None else most
    if count > max(limit, slack):
        raise UsageError(
            f"recipe {recipe.name}: the sweep has {count:,} points, and at most {limit} are scored without being asked for",
            f"Sweep fewer values, choose among them with `workbench search`, or write --max-points {count}. "
            f"Of more than {MOST_POINTS} configurations none is recommended.",
        )


def _labels(dimensions: Sequence[Dimension]) -> dict[str, str]:
    """Return a short, unique name for each dimension; empty for the only one that chooses a method, whose value says enough."""
    choosers = [d for d in dimensions if d.chooses_method]
    short = {}
    for d in dimensions:
        parts = d.name.split(".")
        short[d.name] = ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]
    labels = {}
    for d in dimensions:
        unique = list(short.values()).count(short[d.name]) == 1
        labels[d.name] = "" if d.chooses_method and len(choosers) == 1 else short[d.name] if unique else d.name
    return labels


def _part(label: str, word: str) -> str:
    return f"{label}={word}" if label else word


def _words(values: Sequence[Value]) -> list[str]:
    """Return a short text for each value, all different and safe in the name of a folder."""
    counts = [len(value) for value in values if isinstance(value, tuple)]
    words = [_word(value, len(set(counts)) == len(counts)) for value in values]
    return [word if words.count(word) == 1 else f"{word}.{i + 1}" for i, word in enumerate(words)]


def _word(value: Value, counted: bool) -> str:
    if isinstance(value, tuple):
        return str(len(value)) if counted else "+".join(_WORD.sub("-", name) for name in value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return _WORD.sub("-", str(value).lower() if isinstance(value, bool) else str(value)).strip("-") or "empty"


def _flow(value: Value) -> str:
    """Return a value as `--set` reads it."""
    plain = list(value) if isinstance(value, tuple) else value
    return yamldoc.dump([plain], default_flow_style=True, width=1_000_000).strip()[1:-1]
