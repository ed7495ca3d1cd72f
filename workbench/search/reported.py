"""Finished searches in `workbench report`, each with a page beside the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.naming import find, load_named
from workbench.console.output import out
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.project import relative
from workbench.search.result import RESULT, SearchResult

if TYPE_CHECKING:
    from workbench.recipe.recipe import Recipe

KEY_LETTERS = 8  # of the key, in the folder's name


def searched(names: list[str], settings: list[str] | None, runs_dir: Path | None) -> tuple[dict[str, SearchResult], list[str]]:
    """Find the newest finished search of each recipe that has a `search` field.

    Args:
        names: Recipes and other arguments of the command line.
        settings: Values of `--set`.
        runs_dir: Directory of runs; default: runs/ in the recipe's project.

    Returns:
        Results by recipe name, and the names of recipes whose search is not finished.

    Raises:
        WorkbenchError: If a search.json is not a search's result.
    """
    from workbench.ground.project import runs_of

    results: dict[str, SearchResult] = {}
    unfinished = []
    for recipe in _recipes(names, settings, runs_dir):
        folders = (runs_dir or runs_of(recipe.project)) / "search"
        pattern = f"{_literal(recipe.name)}-{'?' * KEY_LETTERS}"
        for file in sorted(folders.glob(f"{pattern}/{RESULT}"), key=lambda f: f.stat().st_mtime, reverse=True):
            found = SearchResult.read(Path(relative(file)), _again(recipe))
            if found.name == recipe.name:
                results[recipe.name] = found
                break
        else:
            unfinished.append(recipe.name)
            if any(folders.glob(pattern)):
                out.say(f"the search of {recipe.name} is not finished; resume it: {_again(recipe)}")
    return results, unfinished


def write_pages(results: Mapping[str, SearchResult], to: Path) -> list[Path]:
    """Write a page for each search beside the report, and return the paths.

    Args:
        results: Results of searches by recipe name.
        to: The report's HTML file. Pages are called <stem>-search, or <stem>-search-NAME if there are several.
    """
    from workbench.report import stem
    from workbench.search.pages import render

    paths = []
    for name, found in results.items():
        suffix = f"-{name}" if len(results) > 1 else ""
        paths += render(found, to.with_name(f"{stem(to)}-search{suffix}.html"))
    return paths


def _recipes(names: list[str], settings: list[str] | None, runs_dir: Path | None) -> list[Recipe]:
    """Return the named recipes that have a `search` field."""
    recipes = []
    for name in dict.fromkeys(names):
        try:
            if find(name, runs_dir).kind != "recipe":
                continue
            recipe = load_named(name, settings or ())
        except WorkbenchError:  # `open_subjects` reports it as left out
            continue
        if recipe.fields.search is not None:
            recipes.append(recipe)
    return recipes


def _again(recipe: Recipe) -> str:
    return shell("workbench", "search", relative(recipe.path) if recipe.path else recipe.name)


def _literal(name: str) -> str:
    """Return a name escaped for use in a glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
