"""Names of the points of a sweep, such as "[lambda=0.5,ties]", and the fields and values that such a name stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from workbench.compare.swept import Value
from workbench.ground import yamldoc
from workbench.ground.errors import UsageError, WorkbenchError, nearest
from workbench.recipe.fields import same
from workbench.recipe.methods import methods
from workbench.recipe.schema import fields_of, known_method, weighs
from workbench.recipe.space import Dimension, FieldSpace
from workbench.steps import VERBS

_WORD = re.compile(r"[^A-Za-z0-9._+-]+")
Place = tuple[int | None, tuple[str | int, ...]]
"""A step, or None for the recipe itself, and the keys of a field below it."""
Domains = Mapping[str, Sequence[Value]]
"""Field -> its values."""


class Given(NamedTuple):
    """What a part of a point's name says: a field, by its full name, and its value."""

    field: str
    value: Value
    part: str


def place_of(dimension: Dimension) -> Place:
    """Return where a dimension's field stands, which is the same for all of its names."""
    return (dimension.step, dimension.path)


class PointNames:
    """Writes and reads the names of a recipe's points.

    A name whose fields are all in the recipe's `sweep` is short, and found by expanding it. A name with fields of `--sweep` says all
    that it takes to read it back from the recipe alone.

    Args:
        space: The recipe's fields.
        own: The recipe's `sweep`.
    """

    def __init__(self, space: FieldSpace, own: Domains) -> None:
        self.space, self.recipe = space, space.recipe
        dimensions = [space.located(name) for name in own]
        self.own = {place_of(d): (d.name, list(own[d.name]), _words(own[d.name])) for d in dimensions}
        self.labels = _labels(dimensions)

    def of(
        self, dimensions: Sequence[Dimension], domains: Domains, asked: frozenset[str], combined: Sequence[Mapping[str, Value]]
    ) -> tuple[dict[str, str], list[str]]:
        """Return the label of each dimension, and the end of each point's name.

        Args:
            dimensions: The dimensions in the order of the names.
            domains: Their values.
            asked: Those of `--sweep`.
            combined: The values of each point.

        Raises:
            WorkbenchError: If a name with a value of `--sweep` would not be read back.
        """
        labels = _labels(dimensions)
        words = {name: [_spelled(v) for v in vs] if name in asked else _words(vs) for name, vs in domains.items()}

        def parts(values: Mapping[str, Value]) -> list[str]:
            return [_part(labels[name], words[name][domains[name].index(value)]) for name, value in values.items()]

        def misread() -> list[str]:
            """Return the fields of `--sweep` that the names do not say rightly."""
            wrong: dict[str, None] = {}
            for values in combined:
                read: dict[Place, Value] = {}
                with suppress(WorkbenchError):
                    read = {place_of(self.space.located(one.field)): one.value for one in self.read(parts(values))}
                places = {name: place_of(self.space.located(name)) for name in values if name in asked}
                wrong |= {n: None for n, at in places.items() if at not in read or not same(read[at], values[n])}
            return list(wrong)

        if asked:
            labels |= {name: label for name, label in self.labels.items() if name in domains and name not in asked}
            labels |= {name: name for name in misread()}
            if wrong := misread():
                text = f"--sweep {wrong[0]}: the names of its points would not say its values"
                raise UsageError(text, "Write the values under `sweep` in the recipe.")
        return labels, [f"[{','.join(parts(values))}]" for values in combined]

    def read(self, parts: Sequence[str]) -> list[Given]:
        """Return the fields and values that the parts of a name give, such as "lambda=0.5" and "ties", in the order of the name.

        Raises:
            WorkbenchError: If a part is no field or method of the recipe, or could be several.
        """
        mine = {label: name for name, label in self.labels.items()}
        found: dict[Place, Given] = {}
        chosen: dict[int | None, type[Any] | None] = {}
        split = [(label, word) for label, _, word in (part.rpartition("=") for part in parts)]
        # A step's method decides which other fields exist, so it is read first.
        for label, word in sorted(split, key=lambda one: one[0].rpartition(".")[2] not in ("", *VERBS)):
            dimension = self.space.located(mine.get(label) or self._field(label, word, chosen))
            name, values, words = self.own.get(place_of(dimension), (dimension.name, [], []))
            if label in mine and word not in words:
                raise UsageError(
                    f"The sweep has no {_part(label, word)}.", f"Write {_part(name, word)} for a value that it lacks."
                )
            value = values[words.index(word)] if word in words else _unspelled(word)
            if dimension.chooses_method:
                chosen[dimension.step] = known_method(str(dimension.path[0]), str(value), self.recipe.project)
            if place_of(dimension) in found:
                raise UsageError(f"'{_part(label, word)}' is a second value of {name}.")
            found[place_of(dimension)] = Given(name, value, _part(label, word))
        order = [_part(label, word) for label in mine for name, word in split if name == label]  # as `of` writes them
        order += [_part(*one) for one in split]
        return sorted(found.values(), key=lambda one: order.index(one.part))

    def _field(self, label: str, word: str, chosen: Mapping[int | None, type[Any] | None]) -> str:
        """Return the full name of the field that a label stands for."""
        if label and label != "bricks":  # a recipe has bricks too, but no values of them
            with suppress(WorkbenchError):
                return self.space.located(label).name
        steps = [
            (key, step, chosen.get(i) or type(step))
            for i, (key, step) in enumerate(zip(self.recipe.step_ids, self.recipe.steps, strict=True))
        ]
        if label:
            found = [f"{key}.{label}" for key, _, kind in steps if label in fields_of(kind)]
            if label in self.recipe.fields.bricks:
                found += [f"{key}.bricks.{label}" for key, step, kind in steps if step.merges and weighs(kind)]
            known = {field for _, _, kind in steps for field in fields_of(kind)}
        else:
            method, project = str(_unspelled(word)), self.recipe.project
            found = [f"{key}.{step.verb}" for key, step, _ in steps if known_method(step.verb, method, project)]
            known = {cls.name for cls in methods().values() if any(cls.verb == step.verb for _, step, _ in steps)}
        what = label or word
        if len(found) > 1:
            raise UsageError(f"'{what}' could be {' or '.join(found)}.", f"Write {found[0]}={word}.")
        if not found:
            raise UsageError(f"No step has the {'field' if label else 'method'} '{what}'. {nearest(what, known)}")
        return found[0]


def _spelled(value: Value) -> str:
    """Return a value for a name from which `_unspelled` reads it back."""
    if isinstance(value, tuple):
        return "+".join(quote(name, safe="") for name in value) + ("+" if len(value) == 1 else "")
    return _word(value, False) if isinstance(value, (bool, float)) else quote(flow(value), safe="")


def _unspelled(word: str) -> Value:
    value = yamldoc.scalar(unquote(word)).data
    if "+" in word and isinstance(value, str):
        return tuple(unquote(name) for name in word.removesuffix("+").split("+"))
    if not isinstance(value, (bool, int, float, str)):
        raise UsageError(f"Expected a number or a word, found '{word}'.")
    return value


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


def flow(value: Value) -> str:
    """Return a value as `--set` reads it."""
    return yamldoc.flow(value)
