"""Resolve recipes named on the command line, and print the commands that score a recipe's result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli._output import out
from workbench.errors import UsageError, WorkbenchError, nearest, shell

if TYPE_CHECKING:
    from workbench.recipe.recipe import Recipe
    from workbench.resolve.resolved import Resolved

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


def score_lines(resolved: Resolved, recipe: Path, settings: Sequence[str] | None, checkpoint: Path | None = None) -> list[str]:
    """Return the commands that score a recipe's result; an empty list if `eval` would refuse the recipe.

    Args:
        resolved: The recipe.
        recipe: The recipe as named on the command line.
        settings: Values of `--set`.
        checkpoint: The written checkpoint, if plain lm-eval can load it.
    """
    from workbench.evaluate.suitechoice import suites_of
    from workbench.models.architecture import is_usual_decoder
    from workbench.scores.suite import Suite

    project = resolved.recipe.project
    options = [part for setting in settings or () for part in ("--set", setting)]
    if not is_usual_decoder(resolved.base.config):
        from workbench.models.skeleton import check_decoder

        try:
            check_decoder(resolved.base.config)
        except WorkbenchError:
            return []
    try:
        suites = suites_of([resolved.recipe], [], project)
    except WorkbenchError:
        named = (
            ""
            if resolved.recipe.fields.eval
            else next(iter(sorted(f.stem for f in (project / "evals/suites").glob("*.yaml"))), "")
        )
        return [f"score:  {shell('workbench', 'eval', recipe, *options, '--suite', named)}"] if named else []
    lines = [f"score:  {shell('workbench', 'eval', recipe, *options)}"]
    tasks = next((",".join(suite.tasks) for suite in suites if isinstance(suite, Suite)), None)
    if checkpoint is not None and tasks is not None:
        own = project / "evals" / "tasks"
        place = ["--include_path", os.path.relpath(own)] if own.is_dir() else []
        model = f"pretrained={checkpoint},logits_cache=False,softmax_dtype=float32"
        command = ["lm_eval", "--model", "hf", "--model_args", model, "--batch_size", "32", *place, "--tasks", tasks]
        lines.append(f"        {shell(*command)}")
    return lines


def load(recipe: Path, settings: list[str] | None, runs_dir: Path | None, headers_only: bool = False) -> tuple[Resolved, Path]:
    """Load a recipe and resolve its inputs.

    Args:
        recipe: The recipe as named on the command line.
        settings: Values of `--set`.
        runs_dir: Directory of runs; default: runs/ in the project.
        headers_only: Read only headers of hub files, and download nothing.

    Returns:
        The resolved recipe, and the directory of runs.
    """
    from workbench.bricks.hub import Hub
    from workbench.resolve.resolve import resolve

    loaded = load_named(str(recipe), settings or ())
    return resolve(loaded, Hub(headers_only=headers_only, events=out.event)), runs_dir or relative(loaded.project / "runs")


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


def relative(path: Path) -> Path:
    """Return a path relative to the current folder if it lies below it, else unchanged."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path
