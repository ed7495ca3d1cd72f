"""`recipe diff`: the fields in which two recipes differ, with defaults filled in, and the inputs whose content differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from workbench.bricks.hub import Hub
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest
from workbench.ground.results import JsonObject, Result
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved

_ABSENT = object()


Which = Literal["first", "second"]


class FieldDifference(JsonObject):
    """A field that the two recipes set differently."""

    field: str
    """Name as in `--set`, such as "mix.lambda" or "output.dtype"; "steps" for the names and order of the steps."""
    first: Any
    """Value in the first recipe, with defaults filled in; null if it does not have the field."""
    second: Any
    """Value in the second recipe; null if it does not have the field."""
    only: Which | None
    """The recipe that alone has the field; null if both have it."""


class InputDifference(JsonObject):
    """The base, a brick or a file of a step whose location or content differs."""

    name: str
    """The word "base", or "bricks.NAME", or the step and the number of its file."""
    first: str | None
    """Location as the first recipe writes it; null if it lacks the input."""
    second: str | None
    """Location as the second recipe writes it; null if it lacks the input."""
    first_digest: str | None
    """Digest of the content in the first recipe; null if not known."""
    second_digest: str | None
    """Digest of the content in the second recipe; null if not known."""
    same_content: bool | None
    """This is true if both contents are the same, and null if a digest is not known."""


class UnreadRecipe(JsonObject):
    """A recipe whose inputs could not be read, so that no digest is known."""

    recipe: Which
    """The recipe."""
    reason: str
    """The error that `plan` gives."""


class RecipeDifference(Result):
    """The fields and inputs in which two recipes differ."""

    first: str
    """File of the first recipe."""
    second: str
    """File of the second recipe."""
    fields: list[FieldDifference]
    """Fields that differ."""
    inputs: list[InputDifference]
    """Inputs that differ in location or content."""
    same_result: bool | None
    """This is true if both recipes make the same configuration, and null if that is not known."""
    unread: list[UnreadRecipe]
    """Recipes whose inputs could not be read."""


def recipe_difference(first: Recipe, second: Recipe, hub: Hub, names: tuple[str, str]) -> RecipeDifference:
    """Compare two recipes: all fields with defaults filled in, and the contents of base, bricks and files."""
    unread: list[UnreadRecipe] = []
    resolved = [_resolved(first, hub, unread, "first"), _resolved(second, hub, unread, "second")]
    steps = _step_names(first, second)
    before, after = _flat(first, steps[0]), _flat(second, steps[1])
    fields = [
        FieldDifference(
            field=key,
            first=before.get(key),
            second=after.get(key),
            only=None if key in before and key in after else "first" if key in before else "second",
        )
        for key in dict.fromkeys((*before, *after))
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    left, right = (dict(_inputs(r, recipe, n)) for r, recipe, n in zip(resolved, (first, second), steps, strict=True))
    inputs = []
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name, (None, None)), right.get(name, (None, None))
        one_place = a[0] == b[0] and first.project == second.project  # the same content, also where its digest is not known
        if a != b and not (one_place and None in (a[1], b[1])):
            same = None if None in (a[1], b[1]) else a[1] == b[1]
            inputs.append(
                InputDifference(name=name, first=a[0], second=b[0], first_digest=a[1], second_digest=b[1], same_content=same)
            )
    known = [r for r in resolved if r is not None and not r.headers_only]
    same_result = known[0].key == known[1].key if len(known) == 2 else None
    return RecipeDifference(first=names[0], second=names[1], fields=fields, inputs=inputs, same_result=same_result, unread=unread)


def _resolved(recipe: Recipe, hub: Hub, unread: list[UnreadRecipe], which: Which) -> Resolved | None:
    """Return the recipe with its inputs; if they are missing or do not fit, note the reason and return None."""
    try:
        return resolve(recipe, hub)
    except WorkbenchError as error:
        unread.append(UnreadRecipe(recipe=which, reason=error.message.splitlines()[0]))
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


def _flat(recipe: Recipe, names: Sequence[str]) -> dict[str, object]:
    """Return all fields of a recipe as dotted name -> value, defaults filled in."""
    plain = recipe.fields.model_dump(mode="json", by_alias=True, exclude={"steps", "bricks", "name"})
    flat = {"name": recipe.name, **_dotted(plain)}
    for name, ref in recipe.fields.bricks.items():  # a plain path as text
        flat[f"bricks.{name}"] = ref.data()["path"] if set(ref.data()) == {"path"} else dict(ref.data())
    flat["steps"] = list(names)
    for name, step in zip(names, recipe.steps, strict=True):
        flat |= {f"{name}.{key}": value for key, value in _dotted(step.model_dump(mode="json", by_alias=True)).items()}
    return flat


def _dotted(data: Mapping[str, object]) -> dict[str, object]:
    """Return nested mappings as one level of dotted names; lists and empty mappings stay values."""
    flat: dict[str, object] = {}
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
