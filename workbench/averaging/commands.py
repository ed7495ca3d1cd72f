"""Command `recipe soup`."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench.console.output import out
from workbench.ground.errors import UsageError, WorkbenchError, shell


def soup(
    name: Annotated[str, typer.Argument(help="NAME for recipes/NAME.yaml.", show_default=False)],
    run: Annotated[str, typer.Option("--run", help="A trainer's folder, or a hub id.")],
    suite: Annotated[str, typer.Option(help="Suite whose scores decide.")],
    base: Annotated[str, typer.Option(help="Base model.")] = "bricks/starter/base",
    last: Annotated[int | None, typer.Option(min=2, metavar="N", help="The last N checkpoints; default: all.")] = None,
) -> None:
    """Write a greedy soup of a training run's checkpoints, for `workbench search`."""
    from workbench.api.naming import recipes_folder
    from workbench.averaging.window import window_of
    from workbench.ground import yamldoc
    from workbench.ground.files import write_text
    from workbench.ground.foreign_names import as_name
    from workbench.ground.project import find_project
    from workbench.steps.fields import Window

    project, path = find_project(), recipes_folder() / f"{name}.yaml"
    if as_name(name) != name:
        raise UsageError(f"{name}: expected a name of a-z, 0-9 and . _ -", f"workbench recipe soup {as_name(name) or 'soup'}")
    if path.exists():
        raise WorkbenchError(f"{path}: already exists", "Choose another name: existing files are not overwritten.")
    chosen, _ = window_of("run", run, Window(last=last), project)
    if len(chosen) < 2:
        raise UsageError(f"--run {run}: a soup takes two checkpoints, and one is in the window", "Raise --last.")
    steps = {f"step-{one.step}": {one.kind: one.place.removeprefix(f"{project}/")} for one in chosen}
    recipe = {
        "version": 1,
        "base": base,
        "bricks": steps,
        "steps": [{"id": "mix", "merge": "linear", "bricks": dict.fromkeys(steps, 1.0)}],
        "eval": [suite],
        "search": {"sampler": "greedy", "space": {f"mix.bricks.{step}": {"choices": [0.0, 1.0]} for step in steps}},
    }
    write_text(path, f"# workbench search {shell(name)}\n{yamldoc.dump(recipe)}")
    out.line(str(path))
    out.say(f"{len(chosen)} checkpoints, {2 * len(chosen) - 1} candidates: workbench search {shell(name)}")
