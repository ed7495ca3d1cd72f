"""Find the recipes that a user names: by file, by name in recipes/, or as points of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UsageError, WorkbenchError, nearest

if TYPE_CHECKING:
    from workbench.recipe.recipe import Recipe

SUFFIXES = (".yaml", ".yml")


def recipe_path(name: str) -> Path:
    """Return a recipe's file, given its path or its name in recipes/; if neither exists, return the name as a path.

    A point of a sweep, such as "mine[lambda=0.5]", has its recipe's file.
    """
    path = Path(name)
    if name.endswith("]") and not path.is_file():
        path = Path(name := name.partition("[")[0])
    if path.is_file() or path.suffix in SUFFIXES:
        return path
    return next((named for suffix in SUFFIXES if (named := Path("recipes") / f"{name}{suffix}").is_file()), path)


def recipe_file(name: str) -> Path:
    """Return a recipe's file, for commands that take recipes only.

    Raises:
        WorkbenchError: If there is no such recipe; the message suggests the nearest name.
    """
    path = recipe_path(name)
    if path.is_file() or path.suffix in SUFFIXES:
        return path
    raise UsageError(
        f"no recipe '{name}': expected a file, or the name of a file in recipes/. {nearest(name, known_recipes())}",
        "`ls recipes` lists the recipes of this project; `workbench recipe new recipes/NAME.yaml` creates one.",
    )


def known_recipes() -> list[str]:
    """Return the names of the recipes in recipes/."""
    return sorted(file.stem for suffix in SUFFIXES for file in Path("recipes").glob(f"*{suffix}"))


def no_subject(name: str, others: str = "a model directory or a hub id (org/name)", known: Iterable[str] = ()) -> WorkbenchError:
    """Return the error for an argument that is neither a recipe nor anything else that a command accepts.

    Args:
        name: The argument.
        others: Other things that the command accepts.
        known: Names of these, for the suggestion.
    """
    message = f"'{name}': expected a recipe, {others}. {nearest(name, {*known_recipes(), *known})}"
    return UsageError(message)


def load_named(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Load a recipe, or a point of a recipe's sweep by its name, such as "mine[lambda=0.5,ties]".

    Raises:
        WorkbenchError: If there is no such recipe or point, or the recipe is invalid.
    """
    from workbench.recipe.recipe import load_recipe

    loaded = load_recipe(recipe_file(name), settings)
    if not (point := point_in(name)):
        return loaded
    from workbench.search.sweep import point_of

    return point_of(loaded, point)


def point_in(name: str) -> str:
    """Return the part of a name that chooses a point of a sweep, such as "[lambda=0.5,ties]"; empty if there is none."""
    return "" if Path(name).is_file() or not name.endswith("]") else "".join(name.partition("[")[1:])


def recipe_named(name: str) -> Path | None:
    """Return the recipe file that an argument names, or None if it names no recipe."""
    path = recipe_path(name)
    return path if path.is_file() and path.suffix in (".yaml", ".yml") else None
