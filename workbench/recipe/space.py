"""Fields of a recipe that a sweep or a search varies, and the recipes with other values."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.recipe.fields import Range, SweepValue
from workbench.recipe.methods import MethodFinder
from workbench.recipe.recipe import Recipe, from_data
from workbench.recipe.schema import choose_method, fields_of, weighs
from workbench.steps import VERBS

DIGITS = 4
"""Significant digits of drawn numbers, so that a written recipe has exactly the values that were scored."""
Values = Mapping[str, SweepValue]
UNVARIED = ("search", "sweep", "steps", "version", "eval", "name", "description")
"""Fields of a recipe that do not change its result, or are no single value."""
_PLACE = re.compile(r"(?m)^recipe [^:\n]*(:\d+:\d+)?:? ")  # beginning of an error in a recipe without a file


@dataclass(frozen=True)
class Dimension:
    """A field that varies.

    Attributes:
        name: Name as in the recipe, such as "mix.bricks.math".
        step: Index of its step; None for a field of the recipe itself.
        path: Keys and indices below the step or the recipe.
        domain: Range or Choices.
        whole: True if the field takes only whole numbers.
    """

    name: str
    step: int | None
    path: tuple[str | int, ...]
    domain: Any
    whole: bool = False

    @property
    def chooses_method(self) -> bool:
        """True if the dimension is the step's method, such as "mix.merge"."""
        return self.step is not None and self.path[0] in VERBS and len(self.path) == 1

    @property
    def ends(self) -> tuple[SweepValue, ...]:
        """Values to validate: the ends of a range, or all choices."""
        if isinstance(self.domain, Range):
            return (self.round(self.domain.low), self.round(self.domain.high))
        return tuple(self.domain.choices)

    def round(self, value: float) -> float | int:
        """Round a number to its form in a recipe."""
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def holds(self, value: Any) -> bool:
        """Return True if a value is in the domain."""
        if isinstance(self.domain, Range):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return number and self.domain.low <= value <= self.domain.high
        return value in self.domain.choices


class FieldSpace:
    """Fields of a recipe that vary, with their domains.

    Args:
        recipe: The recipe.
        domains: Names of fields such as "mix.bricks.math" -> ranges or choices.

    Raises:
        WorkbenchError: If a step or field does not exist, or a field does not accept an end of a range or a choice.
    """

    place: ClassVar[tuple[str, ...]]
    """Keys of the recipe that hold the domains, for errors."""

    def __init__(self, recipe: Recipe, domains: Mapping[str, Any]) -> None:
        self.recipe = recipe
        self.plain = plain_data(recipe)
        self.dimensions = [self.located(name, domain) for name, domain in domains.items()]
        # A step's method decides which other fields exist, so it is drawn first.
        self.dimensions.sort(key=lambda dimension: not dimension.chooses_method)
        self.dimensions = [self._checked(dimension) for dimension in self.dimensions]

    @cached_property
    def names(self) -> list[str]:
        """Names of the dimensions in the order in which they are drawn."""
        return [dimension.name for dimension in self.dimensions]

    @cached_property
    def conditional(self) -> bool:
        """True if a dimension does not exist for every method."""
        choosers = [d for d in self.dimensions if d.chooses_method]
        return any(len(self.active({d.name: value})) < len(self.dimensions) for d in choosers for value in d.domain.choices)

    def active(self, values: Values) -> list[Dimension]:
        """Return the dimensions that exist for the methods in `values`; `task_arithmetic`, for example, has no `density`."""
        return [dimension for dimension in self.dimensions if self._exists(dimension, values)]

    def document(self, values: Values, name: str | None = None) -> dict[str, Any]:
        """Return the recipe as plain data with these values, without `search`, `sweep` and fields that a chosen method does not have."""
        data = copy.deepcopy(self.plain)
        data.pop("search", None)
        data.pop("sweep", None)
        data = {"version": 1, "name": name or self.recipe.name, **{k: v for k, v in data.items() if k not in ("version", "name")}}
        for dimension in self.dimensions:
            if dimension.name in values and dimension.chooses_method:
                verb, method = str(dimension.path[0]), str(values[dimension.name])
                choose_method(data["steps"][dimension.step], verb, method, self.recipe.project)
        for dimension in self.active(values):
            if dimension.name in values and not dimension.chooses_method:
                self._put(data, dimension, values[dimension.name])
        return data

    def recipe_of(self, values: Values, name: str | None = None) -> Recipe:
        """Return the recipe of a candidate.

        Raises:
            WorkbenchError: If the recipe does not accept the values.
        """
        made = from_data(self.document(values, name), self.recipe.project)
        return replace(made, typed=self.recipe.typed_with({"name": made.name, "search": None, **values}))

    def written(self, method: Values | None = None) -> Values | None:
        """Return the recipe's own values, or None if one of them is outside the space.

        Args:
            method: Method of one step that replaces the recipe's own; fields that only this method has get their defaults.
        """
        recipe = self.recipe_of(method) if method else self.recipe
        values = {}
        for dimension in self.active(method or {}):
            value = self._get(dimension, recipe)
            if not dimension.holds(value):
                return None
            values[dimension.name] = value
        return values

    def other_methods(self) -> list[Values]:
        """Return a choice for each method in the space that differs from the recipe's own."""
        choosers = [d for d in self.dimensions if d.chooses_method]
        return [{d.name: v} for d in choosers for v in d.domain.choices if v != self._get(d, self.recipe)]

    def located(self, name: str, domain: Any = None) -> Dimension:
        """Return the dimension of a name such as "mix.density"; raise WorkbenchError if its step or field does not exist."""
        parts: list[str | int] = [int(part) if part.isdecimal() else part for part in name.split(".")]
        ids = {step_id: i for i, step_id in enumerate(self.recipe.step_ids)}
        head = parts[0]
        step = ids.get(str(head), head if isinstance(head, int) and head < len(self.recipe.steps) else None)
        if step is not None and len(parts) > 1:
            return Dimension(name, step, tuple(parts[1:]), domain)
        known = [f for f in type(self.recipe.fields).model_fields if f not in UNVARIED]
        if step is None and head in known:
            return Dimension(name, None, tuple(parts), domain)
        text = "this is a step; add one of its fields: STEP.FIELD" if step is not None else f"no step or field '{head}'"
        raise self._error(name, f"{text}. {nearest(str(head), [*ids, *known])}" if step is None else text)

    def _checked(self, dimension: Dimension) -> Dimension:
        """Return the dimension with `whole` set; raise WorkbenchError if the field does not exist or does not accept its values."""
        numbers = isinstance(dimension.domain, Range)
        error: WorkbenchError | None = None
        for whole in (False, True) if numbers else (False,):
            checked = Dimension(dimension.name, dimension.step, dimension.path, dimension.domain, whole)
            if whole and (dimension.domain.low % 1 or dimension.domain.high % 1):
                break
            error = self._refused(checked)
            if error is None:
                return checked
        assert error is not None
        raise self._error(dimension.name, _PLACE.sub("", error.message), error.hint)

    def _refused(self, dimension: Dimension) -> WorkbenchError | None:
        """Return the error of the first value that the recipe does not accept, with a method for which the dimension exists, or None."""
        for methods_ in self._methods(dimension):
            if not self._exists(dimension, methods_):
                continue
            for value in dimension.ends:
                try:
                    self.recipe_of({**methods_, dimension.name: value})
                except WorkbenchError as error:
                    return error
            return None
        return InvalidRecipeError(f"no method of its step has a field '{dimension.path[0]}'", self._suggest(dimension))

    def _chooser(self, dimension: Dimension) -> Dimension | None:
        """Return the dimension that chooses the method of a dimension's step, or None if the method is fixed."""
        return next((d for d in self.dimensions if d.chooses_method and d.step == dimension.step), None)

    def _methods(self, dimension: Dimension) -> Iterator[Values]:
        """Yield the choices of the method of a dimension's step; an empty one if the method is not a dimension."""
        chooser = self._chooser(dimension)
        if chooser is None or dimension.chooses_method:
            yield {}
        else:
            yield from ({chooser.name: value} for value in chooser.domain.choices)

    def _suggest(self, dimension: Dimension) -> str:
        """Return the hint that names the closest field of the step's methods."""
        known = {field for values in self._methods(dimension) for field in fields_of(self._method(dimension, values))}
        return nearest(str(dimension.path[0]), sorted(known))

    def _method(self, dimension: Dimension, values: Values) -> type[Any] | None:
        """Return the class of a dimension's step under these values, or None if the method does not exist."""
        assert dimension.step is not None
        step = self.recipe.steps[dimension.step]
        chooser = self._chooser(dimension)
        name = values.get(chooser.name, step.name) if chooser else step.name
        return MethodFinder(self.recipe.project).find(step.verb, str(name))

    def _exists(self, dimension: Dimension, values: Values) -> bool:
        """Return True if the step's method under these values has the dimension's field."""
        if dimension.step is None or dimension.chooses_method:
            return True
        kind = self._method(dimension, values)
        if kind is None or dimension.path[0] not in fields_of(kind):
            return False
        # `average` has a list of bricks without weights.
        weighed = not (dimension.path[0] == "bricks" and len(dimension.path) > 1) or weighs(kind)
        return weighed and (
            len(dimension.path) < 3 or dimension.path[0] != "bricks" or dimension.path[2] in fields_of(kind.entry_type())
        )

    def _put(self, data: dict[str, Any], dimension: Dimension, value: SweepValue) -> None:
        """Set a dimension's value in a recipe's plain data; containers that are missing on the way are created."""
        target: Any = data if dimension.step is None else data["steps"][dimension.step]
        path = list(dimension.path)
        if dimension.step is not None and path[0] == "bricks" and len(path) > 1:
            target, path = self._entry(target, path, data)
        knots = path.index("knots") if "knots" in path[:-1] else None
        for i, part in enumerate(path[:-1]):
            default = self._knots(dimension, target, path, i) if knots is not None and i + 1 == knots else {}
            if isinstance(target, list):
                target = target[int(part)]
            elif knots is not None and i + 1 == knots and not isinstance(target.get(part), dict):
                target[part] = {"knots": default}
                target = target[part]
            else:
                target = target.setdefault(part, {})
            if not isinstance(target, (dict, list)):
                raise self._error(dimension.name, f"'{part}' has no fields")
        if isinstance(target, list):
            index = path[-1]
            if not isinstance(index, int) or index >= len(target):
                raise self._error(dimension.name, f"'{index}' is not an index of a list with {len(target)} entries")
            target[index] = value
        else:
            target[path[-1]] = value

    def _entry(self, step: dict[str, Any], path: list[str | int], data: dict[str, Any]) -> tuple[Any, list[str | int]]:
        """Return the container and the path of a brick's weight or field; bricks without a weight get weight 1."""
        bricks = step.get("bricks")
        if not isinstance(bricks, dict):
            step["bricks"] = dict.fromkeys(bricks or data.get("bricks", {}), 1.0)
        bricks, name = step["bricks"], path[1]
        entry = bricks.get(name)
        if len(path) > 2:
            if not isinstance(entry, dict) or "knots" in entry or "first" in entry:
                bricks[name] = {} if entry is None else {"weight": entry}
            return bricks[name], path[2:]
        if isinstance(entry, dict) and not {"knots", "first"} & set(entry):
            return entry, ["weight"]
        return bricks, path[1:]

    def _knots(self, dimension: Dimension, target: Any, path: list[str | int], at: int) -> list[float]:
        """Return the knots of a schedule that the recipe gives as one number: that number at every knot."""
        number = target.get(path[at]) if isinstance(target, dict) else None
        schedule = (dimension.step, dimension.path[:-1])
        count = max(int(d.path[-1]) for d in self.dimensions if (d.step, d.path[:-1]) == schedule) + 1
        return [float(number) if isinstance(number, (int, float)) else 1.0] * max(2, count)

    def _get(self, dimension: Dimension, recipe: Recipe) -> Any:
        """Return a recipe's own value of a dimension, or its default."""
        if dimension.step is None:
            value: Any = json.loads(recipe.fields.model_dump_json(by_alias=True))
        else:
            step = recipe.steps[dimension.step]
            value = {step.verb: step.name, **step.model_dump(mode="json", by_alias=True)}
            if dimension.path[0] == "bricks" and step.merges:
                weights = value.get("bricks") or {}
                value["bricks"] = {
                    name: weights.get(name, 1.0) if isinstance(weights, dict) else 1.0 for name in recipe.used_bricks(step)
                }
        for part in dimension.path:
            if isinstance(value, (int, float)) and part == "knots":
                return value  # the same at every knot
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value.get("weight") if isinstance(value, dict) and dimension.path[0] == "bricks" else value

    def _error(self, name: str, message: str, hint: str | None = None) -> WorkbenchError:
        return self.recipe.error((*self.place, name), message, hint)


def plain_data(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, as in its file."""
    if recipe.document is not None:
        return dict(json.loads(json.dumps(recipe.document.data)))
    data = recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data["bricks"] = {name: ref.data() for name, ref in recipe.fields.bricks.items()}
    return {"version": 1, **data}
