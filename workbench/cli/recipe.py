"""Commands `recipe new|check|schema|import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli._options import RecipesArg, SetOpt
from workbench.cli._output import out
from workbench.cli._trust import reads_recipes
from workbench.errors import UsageError, WorkbenchError, shell

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Create, check and import recipes.")

TEMPLATE = """\
# workbench run {path}
version: 1
base: {base}
bricks:{bricks}
{steps}{suite}"""
STEPS = """\
steps:
  - id: mix
    merge: ties            # `workbench methods` lists all methods
    density: 0.2
    lambda: 1.0
"""
NO_BRICKS = """ {}
  # math: org/math-lora    # an adapter, a checkpoint or a directory with a brick.yaml; then a step that uses it:
steps: []
  # - merge: ties
"""
IGNORED = "runs/\n.workbench/\nreports/\n"


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="File to write, or with --project the recipe's name.", show_default=False)],
    base: Annotated[str, typer.Option(help="Base model: a directory or hub id.")] = "bricks/starter/base",
    brick: Annotated[
        list[str] | None, typer.Option(metavar="NAME=REF", help="Name and directory or hub id of a brick. Repeatable.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Suite to score; default: starter, if the project has it.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Task to score, of lm-eval or of evals/tasks. Repeatable.")
    ] = None,
    project: Annotated[
        Path | None, typer.Option(help="Project folder to create first, with recipes/, bricks/ and evals/.")
    ] = None,
) -> None:
    """Create a recipe to start from, and optionally a project folder.

    Existing files are not overwritten.
    """
    from workbench.project import find_project

    if project is not None:
        for folder in ("recipes", "bricks", "evals/suites", "evals/tasks"):
            (project / folder).mkdir(parents=True, exist_ok=True)
        if not (project / ".gitignore").exists():
            (project / ".gitignore").write_text(IGNORED, "utf-8")
        path = project / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.exists():
        raise WorkbenchError(f"{path}: already exists", "Choose another name: existing files are not overwritten.")
    root = project or find_project(path)
    has_starter = (root / "bricks" / "add").is_dir() and (root / "bricks" / "reverse").is_dir()
    pairs = [entry.partition("=") for entry in brick or (["add=bricks/add", "reverse=bricks/reverse"] if has_starter else [])]
    if bad := [name for name, equals, ref in pairs if not equals or not ref]:
        raise UsageError(f"--brick {bad[0]}: expected NAME=REF", "--brick math=org/math-lora")
    lines = "".join(f"\n  {name}: {ref}" for name, _, ref in pairs) or NO_BRICKS.rstrip("\n")
    if suite is None and not task and (root / "evals" / "suites" / "starter.yaml").is_file():
        suite = "starter"
    scored = [*([suite] if suite else []), *([f"{{tasks: [{', '.join(task)}]}}"] if task else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = TEMPLATE.format(
        path=shell(path),
        base=base,
        bricks=lines,
        steps=STEPS if pairs else "",
        suite=f"eval: [{', '.join(scored)}]\n" if scored else "",
    )
    path.write_text(text, "utf-8")
    out.line(str(path))
    out.say(f"check: workbench recipe check {shell(path)}")


@app.command()
@reads_recipes
def check(recipes: RecipesArg, settings: SetOpt = None) -> None:
    """Check recipes without reading their inputs.

    Exits with 2 if a recipe is invalid.
    """
    from workbench.cli._recipes import recipe_file
    from workbench.recipe.recipe import load_recipe

    failed = False
    for name in recipes:
        try:
            recipe = load_recipe(recipe_file(name), settings or ())
            out.line(f"{name}: ok, {len(recipe.steps)} step{'s' if len(recipe.steps) != 1 else ''}")
        except WorkbenchError as error:
            out.error(error)
            failed = True
    if failed:
        raise typer.Exit(2)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from workbench.recipe.schema import recipe_schema

    out.json(recipe_schema())


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="YAML file for mergekit-yaml.", show_default=False)],
    to: Annotated[Path | None, typer.Option("-o", "--out", help="Recipe file to write; default: print the recipe.")] = None,
) -> None:
    """Convert a mergekit YAML into a recipe with the same result.

    If the file uses something that recipes do not have, lists it and writes nothing.
    """
    from workbench.recipe.mergekit import import_recipe, write_imported

    imported = import_recipe(file, to)
    if to is None:
        out.line(imported.text.rstrip("\n"))
    else:
        write_imported(imported, to)
        for path in (to, *imported.extra):
            out.line(str(path))
    for note in imported.notes:
        out.say(f"note: {note}")
    if to is not None:
        out.say(f"next: workbench plan {shell(to)}")
