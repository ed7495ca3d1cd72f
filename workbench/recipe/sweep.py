"""Sweeps: the configurations that a recipe with a `sweep` stands for, one for each combination of values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workbench.compare.swept import Sweep, SweepDimension, SweepPoint, Value
from workbench.ground import yamldoc
from workbench.ground.errors import UsageError, WorkbenchError, nearest
from workbench.recipe.fields import SweepValues, same
from workbench.recipe.points import Place, PointNames, flow, place_of
from workbench.recipe.recipe import Recipe
from workbench.recipe.space import Dimension, FieldSpace

MOST_POINTS = 64
"""Points of a sweep that are scored without being asked for; with its controls, the recommendation tests so many against each other."""
_COUNTED = 100_000  # a larger product is refused without counting the points that are the same
_LONGEST = 180  # letters of a point's name, which is also that of a folder


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

    def combinations(self) -> Iterator[dict[str, Value]]:
        """Yield the values of each point, without fields that its methods do not have; each combination once."""
        existing: dict[tuple[Any, ...], list[str]] = {}
        seen = set()
        for values in product(*self.domains.values()):
            point: dict[str, Value] = dict(zip(self.domains, values, strict=True))
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
    plain = _unswept(recipe)
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
    labels, suffixes = _names(recipe).of(swept.in_order, domains, wanted, combined)
    made = [_point(plain, swept, values, suffix) for values, suffix in zip(combined, suffixes, strict=True)]
    dimensions = tuple(SweepDimension(name, labels[name] or name.rpartition(".")[2], values) for name, values in domains.items())
    return Expanded(tuple(one for one, _ in made), Sweep(recipe.name, dimensions, tuple(point for _, point in made)))


def _point(plain: Recipe, swept: _Swept, values: Mapping[str, Value], suffix: str) -> tuple[Recipe, SweepPoint]:
    """Return a point of a sweep, with its name."""
    name = plain.name + suffix
    if len(name) > _LONGEST:
        text = f"recipe {plain.name}: the name of a point has {len(name)} letters, at most {_LONGEST} are possible: {name[: len(plain.name) + 60]}…"
        raise UsageError(
            text, "Sweep fewer fields, or shorter values. Lists are named by their length if the recipe has them under `sweep`."
        )
    data = json.loads(json.dumps(swept.document(values)))
    if plain.fields.name is None:
        data.pop("name")
    try:
        made = plain.varied(data, plain.point + suffix, [f"{field}={flow(value)}" for field, value in values.items()])
    except WorkbenchError as error:
        raise error.reworded(f"sweep point {name}: {error.message}", error.hint) from error
    return made, SweepPoint(name, values, yamldoc.dump(data))


def point_of(recipe: Recipe, point: str) -> Recipe:
    """Return the recipe of a point: one of the recipe's own sweep, or one that `--sweep` makes.

    Args:
        recipe: The recipe.
        point: End of the point's name, such as "[lambda=0.5,ties]". The order of its parts does not matter.

    Raises:
        WorkbenchError: If a part of the name is no field, method or value of the recipe, or a field of its sweep is not named.
    """
    own, plain = recipe.fields.sweep or {}, _unswept(recipe)
    try:
        given = {one.field: one for one in _names(recipe).read(point[1:-1].split(","))}
        domains, space = dict(own), _unswept_space(recipe)
        fixed = _fixed(recipe, space)
        if twice := next((one for one in given.values() if place_of(space.located(one.field)) in fixed), None):
            key = fixed[place_of(space.located(twice.field))]
            raise UsageError(f"'{twice.part}' and --set {key} set the same field.", "Remove one of them.")
        for name, one in given.items():  # beside the sweep's own values, for which some field may exist that this one lacks
            values = domains.get(name, ())
            domains[name] = values if any(same(one.value, value) for value in values) else (*values, one.value)
        swept = _Swept(plain, domains, frozenset(domains) - frozenset(own))
        for found in swept.combinations():
            if found.keys() == given.keys() and all(same(value, given[name].value) for name, value in found.items()):
                return _point(plain, swept, found, f"[{','.join(one.part for one in given.values())}]")[0]
        reason, hint = f"A point says {', '.join(domains)}, as far as its method has these fields.", None
    except WorkbenchError as error:
        reason, hint = error.message, error.hint
    near = nearest(recipe.name + point, [one.name for one in expand(recipe, most=_COUNTED).recipes]) if own else ""
    raise UsageError(f"'{recipe.name}{point}': there is no such point. {reason} {near}".rstrip(), hint)


def _names(recipe: Recipe) -> PointNames:
    return PointNames(_unswept_space(recipe), recipe.fields.sweep or {})


def _unswept(recipe: Recipe) -> Recipe:
    return replace(recipe, fields=recipe.fields.model_copy(update={"sweep": None}))


def _unswept_space(recipe: Recipe, asked: frozenset[str] = frozenset()) -> _Swept:
    return _Swept(_unswept(recipe), {}, asked)


def _domains(recipe: Recipe, asked: Sequence[str]) -> tuple[dict[str, tuple[Value, ...]], frozenset[str]]:
    """Return the values of each dimension, and the names of those that `--sweep` gives."""
    given: dict[str, tuple[Value, ...]] = {}
    for text in asked:
        name, values = _read(text)
        if name in given:
            raise UsageError(f"--sweep {name}: given twice", f"Write all values into one: --sweep {name}=VALUE,VALUE,…")
        given[name] = values
    space = _unswept_space(recipe, frozenset(given))
    places = {place_of(space.located(name)): name for name in given}
    fixed = _fixed(recipe, space)
    for place, name in places.items():
        if place in fixed:
            raise UsageError(f"--sweep {name}: --set {fixed[place]} sets the same field", "Remove one of them.")
    own = {
        name: values
        for name, values in (recipe.fields.sweep or {}).items()
        if (place := place_of(space.located(name))) not in places and place not in fixed
    }
    return {**own, **given}, frozenset(given)


def _fixed(recipe: Recipe, space: FieldSpace) -> dict[Place, str]:
    """Return place -> name of the fields that `--set` gives."""
    return {place: key for key in (s.partition("=")[0] for s in recipe.settings) if (place := _written_place(space, key))}


def _written_place(space: FieldSpace, name: str) -> Place | None:
    """Return the place of a field that `--set` names; None if it cannot be swept."""
    try:
        return place_of(space.located(name))
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
        from workbench.compare.leaders import MOST_MEMBERS  # here, because it reads statistics of comparisons

        raise UsageError(
            f"recipe {recipe.name}: the sweep has {count:,} points, and at most {limit} are scored without being asked for",
            f"Sweep fewer values, choose among them with `workbench search`, or write --max-points {count}. "
            f"More than {MOST_MEMBERS} configurations are tested against the baseline and not against each other.",
        )
