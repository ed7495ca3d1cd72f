"""Overrides of `--set`, and the change of a step's method, which drops the fields that the new method does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import yamldoc
from workbench.errors import InvalidRecipeError, UsageError, WorkbenchError, nearest
from workbench.recipe.methods import MethodFinder
from workbench.recipe.schema import RecipeFields
from workbench.steps import MergeMethod, verbs
from workbench.steps.fields import BrickEntry

_SCHEDULE = frozenset({"knots", "first"})
"""Keys of a mapping that is a number by layer, and not the fields of a brick."""


def override(document: yamldoc.Document, settings: Sequence[str], project: Path) -> tuple[str, ...]:
    """Apply overrides of `--set`, such as "mix.density=0.3", "0.lambda=1", "output.dtype=float32" or "seed=1".

    Methods are set first, so that their fields can be set in any order. A field that the recipe's `sweep` varies is no longer varied.

    Args:
        document: The recipe, which is changed.
        settings: The overrides.
        project: Project whose methods are known.

    Returns:
        One sentence for each method that dropped fields.

    Raises:
        WorkbenchError: If an override is malformed or names an unknown step or field.
    """
    ids = _steps(document)
    methods = [setting for setting in settings if _chooses_method(_located(document, setting, ids, lenient=True))]
    notes = [note for setting in methods if (note := _set_method(document, setting, ids, project))]
    ids = {**_steps(document), **ids}  # a step without an id is named after its method, the old one or the new one
    for setting in settings:
        if setting not in methods:
            _put(document, setting, _located(document, setting, ids))
        _fix(document, setting.partition("=")[0], ids)
    return tuple(notes)


def _set_method(document: yamldoc.Document, setting: str, ids: Mapping[str, int], project: Path) -> str:
    """Apply an override that sets a step's method, and return the note about what it drops; "" for nothing."""
    path = _located(document, setting, ids)
    index, verb, method = int(path[1]), str(path[2]), yamldoc.scalar(setting.partition("=")[2]).data
    step, sweep = document.data["steps"][index], document.data.get("sweep")
    if verb not in step or not isinstance(method, str):
        _put(document, setting, path)
        return ""
    dropped = choose_method(step, verb, method, project)
    if (kind := known_method(verb, method, project)) and isinstance(sweep, dict):
        for name in [str(name) for name in sweep]:
            head, _, rest = name.partition(".")
            field = rest.partition(".")[0]
            if ids.get(head, head) in (index, str(index)) and field not in (*verbs(), *fields_of(kind)):
                del sweep[name]
                dropped.append(f"sweep.{name}")
        if not sweep:
            del document.data["sweep"]
    return f"--set {setting} drops {', '.join(dropped)}: {method} has no such field" if dropped else ""


def choose_method(step: dict[str, Any], verb: str, method: str, project: Path) -> list[str]:
    """Set the method of a step in plain data, and return the fields that it drops because the method does not have them.

    An unknown method drops nothing. A field that the old method lacks too is an error of the recipe, and stays.
    """
    old, kind = known_method(verb, str(step[verb]), project), known_method(verb, method, project)
    step[verb] = method
    if kind is None or kind is old:
        return []
    dropped = [
        field for field in step if field not in (*verbs(), "id", *fields_of(kind)) and (old is None or field in fields_of(old))
    ]
    for field in dropped:
        del step[field]
    bricks = step.get("bricks")
    if not isinstance(bricks, dict) or not issubclass(kind, MergeMethod):
        return dropped
    if not weighs(kind):
        step["bricks"] = list(bricks)
        return [*dropped, "weights of bricks"] if any(weight not in (None, 1) for weight in bricks.values()) else dropped
    known = fields_of(kind.entry_type())
    for name, entry in bricks.items():
        if isinstance(entry, dict) and not _SCHEDULE & set(entry):
            foreign = [field for field in entry if field not in known]
            bricks[name] = {field: value for field, value in entry.items() if field in known}
            dropped += [f"bricks.{name}.{field}" for field in foreign]
    return dropped


def fields_of(kind: type[Any] | None) -> set[str]:
    """Return the names of a method's fields as a recipe writes them."""
    return {field.alias or name for name, field in kind.model_fields.items()} if kind is not None else set()


def weighs(kind: type[Any]) -> bool:
    """Return True if a merge method takes a weight for each brick."""
    if not issubclass(kind, MergeMethod) or "bricks" not in kind.model_fields:
        return False
    return issubclass(kind.entry_type(), BrickEntry) and "dict" in str(kind.model_fields["bricks"].annotation)


def known_method(verb: str, method: str, project: Path) -> type[Any] | None:
    """Return a method's class; None if it cannot be used, which validation then reports with its place."""
    try:
        return MethodFinder(project).find(verb, method)
    except WorkbenchError:
        return None


def _located(document: yamldoc.Document, setting: str, ids: Mapping[str, int], lenient: bool = False) -> tuple[str | int, ...]:
    """Return the path of keys that an override names; with `lenient`, an unknown name is no error."""
    key, equals, text = setting.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {setting}: expected FIELD=VALUE or STEP.FIELD=VALUE", "Example: --set mix.density=0.3")
    listed, fields = document.data.get("steps"), [*RecipeFields.model_fields, "steps"]
    places = [i for i, step in enumerate(listed) if isinstance(step, Mapping)] if isinstance(listed, list) else []
    if parts[0] in ids or (parts[0].isdecimal() and int(parts[0]) < len(places)):
        if len(parts) == 1:
            message = f"--set {setting}: '{key}' is a step, expected one of its fields"
            raise InvalidRecipeError(message, f"Write --set {key}.FIELD={text}.")
        return ("steps", ids[parts[0]] if parts[0] in ids else places[int(parts[0])], *parts[1:])
    if parts[0] not in fields and not lenient:
        raise UsageError(f"--set {setting}: no step or field '{parts[0]}'. {nearest(parts[0], [*ids, *fields])}")
    return tuple(parts)


def _put(document: yamldoc.Document, setting: str, path: tuple[str | int, ...]) -> None:
    """Set the value of an override; mappings that are missing on the way are created."""
    target, parts = (document.data["steps"][path[1]], path[2:]) if _in_step(path) else (document.data, path)
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if part == "bricks" and isinstance(inner, list) and all(isinstance(name, str) for name in inner):
            inner = target[part] = dict.fromkeys(inner, 1.0)  # a list of names means weights of 1
        target = inner
        if not isinstance(target, dict):
            raise UsageError(f"--set {setting}: '{part}' has no fields")
    value = yamldoc.scalar(setting.partition("=")[2])
    target[parts[-1]] = value.data
    document.replace_texts(path, value)


def _in_step(path: Sequence[str | int]) -> bool:
    return len(path) > 2 and path[0] == "steps" and isinstance(path[1], int)


def _chooses_method(path: Sequence[str | int]) -> bool:
    return _in_step(path) and len(path) == 3 and path[2] in verbs()


def _fix(document: yamldoc.Document, key: str, ids: Mapping[str, int]) -> None:
    """Remove a field that `--set` gives from the fields that the recipe's `sweep` varies."""
    sweep = document.data.get("sweep")
    if not isinstance(sweep, dict):
        return

    def place(name: str) -> str:
        head, dot, rest = name.partition(".")
        return str(ids.get(head, head)) + dot + rest

    fixed = [name for name in sweep if place(str(name)) == place(key)]
    for name in fixed:
        del sweep[name]
    if fixed and not sweep:
        del document.data["sweep"]


def _steps(document: yamldoc.Document) -> dict[str, int]:
    """Return name -> index of the steps of an unvalidated document: the id of each, or its verb and method."""
    listed = document.data.get("steps")
    return {
        str(step.get("id") or "-".join(f"{verb}-{step[verb]}" for verb in verbs() if verb in step)): i
        for i, step in enumerate(listed if isinstance(listed, list) else ())
        if isinstance(step, Mapping)
    }
