"""`recipe diff`: the fields in which two recipes differ, with defaults filled in, and the inputs whose content differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.bricks.hub import Hub
from workbench.errors import WorkbenchError
from workbench.files import file_digest
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved

_ABSENT = object()


@dataclass(frozen=True)
class FieldDifference:
    """A field that two recipes set differently.

    Attributes:
        field: Name as in `--set`: "mix.lambda", "output.dtype", "bricks.math".
        first, second: Values with defaults filled in; None for a field that one recipe does not have.
        only: "first" or "second" if only that recipe has the field; None if both have it.
    """

    field: str
    first: Any
    second: Any
    only: str | None


@dataclass(frozen=True)
class InputDifference:
    """The base, a brick or a file of a step whose content differs, or whose location differs although its content is the same.

    Attributes:
        name: "base", "bricks.NAME" or the step's name with the file's place among the step's files.
        first, second: Locations as the recipes write them; None if one recipe lacks the input.
        first_digest, second_digest: Digests of the contents; None if they are not known.
    """

    name: str
    first: str | None
    second: str | None
    first_digest: str | None
    second_digest: str | None

    @property
    def same_content(self) -> bool | None:
        """True if both contents are the same; None if a digest is not known."""
        if self.first_digest is None or self.second_digest is None:
            return None
        return self.first_digest == self.second_digest


@dataclass(frozen=True)
class RecipeDifference:
    """Everything in which two recipes differ.

    Attributes:
        fields: Fields that differ, in the order of the first recipe, then those that only the second has.
        inputs: Inputs that differ in content or location.
        unread: For each recipe whose inputs could not be read, the reason.
        same_result: True if both recipes make the same configuration; None if that is not known.
    """

    fields: tuple[FieldDifference, ...]
    inputs: tuple[InputDifference, ...]
    unread: Mapping[str, str]
    same_result: bool | None


def recipe_difference(first: Recipe, second: Recipe, hub: Hub) -> RecipeDifference:
    """Compare two recipes: all fields with defaults filled in, and the contents of base, bricks and files.

    Args:
        first: A recipe.
        second: Another one.
        hub: Access to the hub; its headers are enough for fields, but digests of bricks need the tensors.
    """
    unread: dict[str, str] = {}
    resolved = [_resolved(recipe, hub, unread, label) for recipe, label in ((first, "first"), (second, "second"))]
    names = _step_names(first, second)
    before, after = _flat(first, names[0]), _flat(second, names[1])
    fields = tuple(
        FieldDifference(
            key,
            before.get(key),
            after.get(key),
            None if key in before and key in after else "first" if key in before else "second",
        )
        for key in dict.fromkeys((*before, *after))
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    )
    left, right = (dict(_inputs(r, recipe, n)) for r, recipe, n in zip(resolved, (first, second), names, strict=True))
    inputs = []
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name, (None, None)), right.get(name, (None, None))
        one_place = a[0] == b[0] and first.project == second.project  # the same content, also where its digest is not known
        if a != b and not (one_place and None in (a[1], b[1])):
            inputs.append(InputDifference(name, a[0], b[0], a[1], b[1]))
    known = [r for r in resolved if r is not None and not r.headers_only]
    same = known[0].key == known[1].key if len(known) == 2 else None
    return RecipeDifference(fields, tuple(inputs), unread, same)


def _resolved(recipe: Recipe, hub: Hub, unread: dict[str, str], label: str) -> Resolved | None:
    """Return the recipe with its inputs; if they are missing or do not fit, note the reason and return None."""
    try:
        return resolve(recipe, hub)
    except WorkbenchError as error:
        unread[label] = error.message.splitlines()[0]
        return None


def _step_names(first: Recipe, second: Recipe) -> tuple[list[str], list[str]]:
    """Return a name for each step of both recipes. Steps of equal names are compared, and then the remaining ones in their order.

    A step that is compared with a step of another name has its index as name, which `--set` takes too.
    """
    names = (list(first.step_ids), list(second.step_ids))
    rest = [[i for i, name in enumerate(own) if name not in other] for own, other in (names, names[::-1])]
    for i, j in zip(*rest, strict=False):
        if first.steps[i].verb == second.steps[j].verb:
            names[0][i] = names[1][j] = str(i)
    return names


def _flat(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """Return all fields of a recipe as dotted name -> value, defaults filled in."""
    plain = recipe.fields.model_dump(mode="json", by_alias=True, exclude={"steps", "bricks", "name"})
    flat = {"name": recipe.name, **_dotted(plain)}
    flat |= {f"bricks.{name}": _location(ref.data()) for name, ref in recipe.fields.bricks.items()}
    flat["steps"] = list(names)
    for name, step in zip(names, recipe.steps, strict=True):
        flat |= {f"{name}.{key}": value for key, value in _dotted(step.model_dump(mode="json", by_alias=True)).items()}
    return flat


def _location(data: Mapping[str, Any]) -> Any:
    """Return a brick's location in its shortest form: a plain path as text."""
    return data["path"] if set(data) == {"path"} else dict(data)


def _dotted(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one level of dotted names; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": v for inner, v in _dotted(value).items()}
        else:
            flat[key] = value
    return flat


def _inputs(resolved: Resolved | None, recipe: Recipe, names: Sequence[str]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield name -> (location, digest) of the base, the bricks and the files that steps read."""
    local = resolved is not None and not resolved.headers_only
    yield "base", (recipe.fields.base_name, resolved.base_digest if resolved and local else None)
    for name, ref in recipe.fields.bricks.items():
        brick = resolved.bricks[name] if resolved and local and name in resolved.bricks else None
        yield f"bricks.{name}", (ref.target, brick.digest(resolved.cache) if resolved and brick else None)
    for name, step in zip(names, recipe.steps, strict=True):
        for i, file in enumerate(step.inputs()):
            yield f"{name}, file {i + 1}", (file, _digest(recipe.project / file))


def _digest(path: Path) -> str | None:
    """Return the digest of a file; None for a directory, or if there is no such file."""
    return file_digest(path) if path.is_file() else None
