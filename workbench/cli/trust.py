"""Command `trust`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.console.output import out
from workbench.ground.errors import UsageError, shell


def trust(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Project folder; default: list the trusted projects.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Stop trusting the project.")] = False,
) -> None:
    """Trust a project's Python code, or list trusted projects.

    Recipes of a trusted project may use the methods in methods/, and its tasks the functions in evals/: Python files, which run
    with your rights. If one of these files changes, trust the project again. The list with the files' digests is in your own
    settings (~/.config/workbench/settings.yaml), outside every project.
    """
    from workbench.ground.project import find_project
    from workbench.ground.trust import code_files, distrust, read_settings, settings_file
    from workbench.ground.trust import trust as add

    if folder is None:
        if remove:
            raise UsageError("--remove: no project is named", "workbench trust --remove DIR")
        for path in read_settings().trusted_projects:
            out.line(path)
        out.say(f"settings: {settings_file()}")
        return
    if remove:
        distrust(folder)
        out.say(f"{folder.resolve()} is no longer trusted")
        return
    project = find_project(folder / "recipe.yaml") if folder.is_dir() else folder
    if project.resolve() != folder.resolve():
        raise UsageError(f"{folder}: belongs to the project {project}", shell("workbench", "trust", project))
    news = add(folder)
    files = ", ".join(code_files(folder)) or "it has no Python files in methods/ and evals/ yet"
    out.say(f"{folder.resolve()} is {'now' if news else 'already'} trusted: {files}")
