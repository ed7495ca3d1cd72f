"""Command `recipe diff`."""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import find, load_named
from workbench.console.options import JsonOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.upkeep.recipediff import InputDifference, RecipeDifference


@reads_recipes
def diff(
    first: Annotated[str, typer.Argument(help="A recipe: a file, or NAME for recipes/NAME.yaml.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another recipe.", show_default=False)],
    json: JsonOpt = False,
) -> None:
    """Print the fields in which two recipes differ, with defaults filled in, and inputs whose content differs.

    A field is named as in --set. If a recipe's inputs cannot be read, only fields and locations are compared.
    """
    from workbench.bricks.hub import Hub
    from workbench.upkeep.recipediff import recipe_difference

    names = [f"{relative(one.path) if one.path else one.name}{one.point}" for one in map(find, (first, second))]
    hub = Hub(headers_only=True, events=out.event)
    found = recipe_difference(load_named(first), load_named(second), hub, (names[0], names[1]))
    warnings = [f"digests of the {unread.recipe} recipe are not known: {unread.reason}" for unread in found.unread]
    out.result(lambda: found, lambda: _differences(found), json=json, warnings=warnings)


def _differences(found: RecipeDifference) -> None:
    """Print the differences of two recipes as tables, and what they mean for the result."""
    if found.fields:
        rows = [
            [one.field, *(_value(v, one.only, side) for v, side in ((one.first, "first"), (one.second, "second")))]
            for one in found.fields
        ]
        out.table(["field", found.first, found.second], rows)
    else:
        out.line("no field differs")
    if found.inputs:
        out.line("")
        cells = [
            [one.name, *_places(one), {True: "same", False: "differs", None: "not known"}[one.same_content]]
            for one in found.inputs
        ]
        out.table(["input", found.first, found.second, "content"], cells)
    if found.same_result is not None:
        out.say(f"both recipes make {'the same configuration' if found.same_result else 'different configurations'}")


def _value(value: Any, only: str | None, side: str) -> str:
    """Return a field's value as a recipe writes it; a dash if the recipe does not have the field."""
    if only not in (None, side):
        return "\N{EN DASH}"
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)


def _places(one: InputDifference) -> list[str]:
    """Return the locations of an input in both recipes, each with the beginning of its digest."""
    pairs = ((one.first, one.first_digest), (one.second, one.second_digest))
    return ["\N{EN DASH}" if place is None else place + (f" ({digest[:12]})" if digest else "") for place, digest in pairs]
