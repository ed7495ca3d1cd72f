"""Dimensions of a search as fields of a recipe: values in, a plain recipe out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.errors import WorkbenchError, nearest
from workbench.recipe.methods import methods
from workbench.recipe.recipe import Recipe, from_data
from workbench.recipe.search_fields import Range, Value
from workbench.steps import MergeMethod, verbs
from workbench.steps.fields import BrickEntry

DIGITS = 4
"""Significant digits of a number that is drawn: a recipe that people read holds exactly what was scored."""
Values = Mapping[str, Value]
_PLACE = re.compile(r"(?m)^recipe [^:\n]*(:\d+:\d+)?:? ")  # of an error in a recipe that stands in no file


@dataclass(frozen=True)
class Dimension:
    """A field that a search changes.

    Attributes:
        name: As the recipe gives it: "mix.bricks.math".
        step: Index of its step; None for a field of the recipe itself.
        path: Keys and indices from there on.
        domain: Range or Choices.
        whole: Whether only whole numbers fit.
    """

    name: str
    step: int | None
    path: tuple[str | int, ...]
    domain: Any
    whole: bool = False

    @property
    def chooses_method(self) -> bool:
        """Whether it names the step's method: "mix.merge"."""
        return self.step is not None and self.path[0] in verbs() and len(self.path) == 1

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that are valid if all are: the ends of a range, every choice."""
        if isinstance(self.domain, Range):
            return (self.round(self.domain.low), self.round(self.domain.high))
        return tuple(self.domain.choices)

    def round(self, value: float) -> float | int:
        """A number as it is written into a recipe."""
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def holds(self, value: Any) -> bool:
        """Whether a value lies inside."""
        if isinstance(self.domain, Range):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return number and self.domain.low <= value <= self.domain.high
        return value in self.domain.choices


class Space:
    """The dimensions of a recipe's search.

    Errors, at the recipe's lines: a step or field that does not exist, an end of a range or a choice that the field does not take.
    """

    def __init__(self, recipe: Recipe) -> None:
        fields = recipe.fields.search
        if fields is None:
            raise WorkbenchError(
                f"recipe {recipe.name} has no `search`", "Say what to try: `search: {space: {STEP.FIELD: [0.2, 1.2]}}`.", 2
            )
        self.recipe, self.fields = recipe, fields
        self.plain = plain_data(recipe)
        self.dimensions = [self._dimension(name, domain) for name, domain in fields.space.items()]
        # What names a step's method decides which of its other fields exist: it is drawn first.
        self.dimensions.sort(key=lambda dimension: not dimension.chooses_method)
        self.dimensions = [self._checked(dimension) for dimension in self.dimensions]

    @cached_property
    def names(self) -> list[str]:
        """Of the dimensions, in the order in which they are drawn."""
        return [dimension.name for dimension in self.dimensions]

    @cached_property
    def conditional(self) -> bool:
        """Whether some dimension belongs to one method alone."""
        choosers = [d for d in self.dimensions if d.chooses_method]
        return any(len(self.active({d.name: value})) < len(self.dimensions) for d in choosers for value in d.domain.choices)

    def active(self, values: Values) -> list[Dimension]:
        """Dimensions that exist with these methods: `density` is none of `task_arithmetic`."""
        return [dimension for dimension in self.dimensions if self._exists(dimension, values)]

    def document(self, values: Values, name: str | None = None) -> dict[str, Any]:
        """The recipe as plain data with these values and without `search`. Fields that a chosen method does not have are left out."""
        data = copy.deepcopy(self.plain)
        data.pop("search", None)
        data = {"version": 1, "name": name or self.recipe.name, **{k: v for k, v in data.items() if k not in ("version", "name")}}
        for dimension in self.dimensions:
            if dimension.name in values and dimension.chooses_method:
                self._choose(data["steps"][dimension.step], dimension, str(values[dimension.name]))
        for dimension in self.active(values):
            if dimension.name in values and not dimension.chooses_method:
                self._put(data, dimension, values[dimension.name])
        return data

    def recipe_of(self, values: Values, name: str | None = None) -> Recipe:
        """The candidate. Errors: values that the recipe does not take."""
        return from_data(self.document(values, name), self.recipe.project)

    def written(self, method: Values | None = None) -> Values | None:
        """The values that the recipe itself has, where all of them lie inside the space.

        Args:
            method: Of one step, instead of the recipe's own: fields that only this one has are at their defaults.
        """
        recipe = self.recipe_of(method) if method else self.recipe
        found = {}
        for dimension in self.active(method or {}):
            value = self._get(dimension, recipe)
            if not dimension.holds(value):
                return None
            found[dimension.name] = value
        return found

    def other_methods(self) -> list[Values]:
        """For every method that some step may have and does not have in the recipe: that choice."""
        choosers = [d for d in self.dimensions if d.chooses_method]
        return [{d.name: v} for d in choosers for v in d.domain.choices if v != self._get(d, self.recipe)]

    def _dimension(self, name: str, domain: Any) -> Dimension:
        parts: list[str | int] = [int(part) if part.isdecimal() else part for part in name.split(".")]
        ids = {step_id: i for i, step_id in enumerate(self.recipe.step_ids)}
        head = parts[0]
        step = ids.get(str(head), head if isinstance(head, int) and head < len(self.recipe.steps) else None)
        if step is not None and len(parts) > 1:
            return Dimension(name, step, tuple(parts[1:]), domain)
        known = [f for f in type(self.recipe.fields).model_fields if f not in ("search", "steps", "version", "eval", "name")]
        if step is None and head in known:
            return Dimension(name, None, tuple(parts), domain)
        text = "is a step; name one of its fields" if step is not None else f"no step or field '{head}'"
        raise self._error(name, f"{text}. {nearest(str(head), [*ids, *known])}" if step is None else text)

    def _checked(self, dimension: Dimension) -> Dimension:
        """The dimension, with whether it takes whole numbers only. Errors: no such field, values that it does not take."""
        numbers = isinstance(dimension.domain, Range)
        error: WorkbenchError | None = None
        for whole in (False, True) if numbers else (False,):
            found = Dimension(dimension.name, dimension.step, dimension.path, dimension.domain, whole)
            if whole and (dimension.domain.low % 1 or dimension.domain.high % 1):
                break
            error = self._refused(found)
            if error is None:
                return found
        assert error is not None
        raise self._error(dimension.name, _PLACE.sub("", error.message), error.hint)

    def _refused(self, dimension: Dimension) -> WorkbenchError | None:
        """Why the recipe does not take one of its ends, with some method under which the dimension exists."""
        for methods_ in self._methods(dimension):
            if not self._exists(dimension, methods_):
                continue
            for value in dimension.ends:
                try:
                    self.recipe_of({**methods_, dimension.name: value})
                except WorkbenchError as error:
                    return error
            return None
        return WorkbenchError(f"no method of its step has a field '{dimension.path[0]}'", self._suggest(dimension), 2)

    def _methods(self, dimension: Dimension) -> Iterator[Values]:
        """Choices of the method of a dimension's step; the recipe's own where it is no dimension."""
        chooser = next((d for d in self.dimensions if d.chooses_method and d.step == dimension.step), None)
        if chooser is None or dimension.chooses_method:
            yield {}
        else:
            yield from ({chooser.name: value} for value in chooser.domain.choices)

    def _suggest(self, dimension: Dimension) -> str:
        known = {field for values in self._methods(dimension) for field in _fields_of(self._method(dimension, values))}
        return nearest(str(dimension.path[0]), sorted(known))

    def _method(self, dimension: Dimension, values: Values) -> type[Any] | None:
        """The class of a dimension's step under these values; None for a method that does not exist."""
        assert dimension.step is not None
        step = self.recipe.steps[dimension.step]
        chooser = next((d for d in self.dimensions if d.chooses_method and d.step == dimension.step), None)
        name = values.get(chooser.name, step.name) if chooser else step.name
        return methods().get(f"{step.verb}:{name}")

    def _exists(self, dimension: Dimension, values: Values) -> bool:
        if dimension.step is None or dimension.chooses_method:
            return True
        kind = self._method(dimension, values)
        if kind is None or dimension.path[0] not in _fields_of(kind):
            return False
        # `average` lists its bricks and gives them no weights.
        weighed = not (dimension.path[0] == "bricks" and len(dimension.path) > 1) or _weighs(kind)
        return weighed and (
            len(dimension.path) < 3 or dimension.path[0] != "bricks" or dimension.path[2] in _fields_of(kind.entry_type())
        )

    def _choose(self, step: dict[str, Any], dimension: Dimension, method: str) -> None:
        step[str(dimension.path[0])] = method
        kind = methods().get(f"{dimension.path[0]}:{method}")
        if kind is None:
            return
        for field in [f for f in step if f not in (*verbs(), "id") and f not in _fields_of(kind)]:
            del step[field]
        if "bricks" in step and issubclass(kind, MergeMethod) and not _weighs(kind):
            step["bricks"] = list(step["bricks"])

    def _put(self, data: dict[str, Any], dimension: Dimension, value: Value) -> None:
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
                raise self._error(dimension.name, f"'{index}' is no place in a list of {len(target)}")
            target[index] = value
        else:
            target[path[-1]] = value

    def _entry(self, step: dict[str, Any], path: list[str | int], data: dict[str, Any]) -> tuple[Any, list[str | int]]:
        """Where the weight or a field of a brick stands. A step that says nothing of its bricks takes all: they get weight 1."""
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
        """Knots of a schedule that the recipe gives as one number: that number everywhere."""
        own = target.get(path[at]) if isinstance(target, dict) else None
        before = (dimension.step, dimension.path[:-1])
        count = max(int(d.path[-1]) for d in self.dimensions if (d.step, d.path[:-1]) == before) + 1
        return [float(own) if isinstance(own, (int, float)) else 1.0] * max(2, count)

    def _get(self, dimension: Dimension, recipe: Recipe) -> Any:
        """A recipe's own value, defaults filled in."""
        if dimension.step is None:
            value: Any = json.loads(recipe.fields.model_dump_json(by_alias=True))
        else:
            step = recipe.steps[dimension.step]
            value = {step.verb: step.name, **step.model_dump(mode="json", by_alias=True)}
            if dimension.path[0] == "bricks" and step.merges:
                given = value.get("bricks") or {}
                value["bricks"] = {
                    name: given.get(name, 1.0) if isinstance(given, dict) else 1.0 for name in recipe.used_bricks(step)
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
        return self.recipe.error(("search", "space", name), message, hint)


def _fields_of(kind: type[Any] | None) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()} if kind is not None else set()


def _weighs(kind: type[Any]) -> bool:
    """Whether a merge method takes a weight for each brick."""
    if not issubclass(kind, MergeMethod) or "bricks" not in kind.model_fields:
        return False
    return issubclass(kind.entry_type(), BrickEntry) and "dict" in str(kind.model_fields["bricks"].annotation)


def plain_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, as its file gives it."""
    if recipe.document is not None:
        found: dict[str, Any] = json.loads(json.dumps(recipe.document.data))
        return found
    data = recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data["bricks"] = {name: ref.data() for name, ref in recipe.fields.bricks.items()}
    return {"version": 1, **data}
