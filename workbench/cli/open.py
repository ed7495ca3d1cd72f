"""Command `open`."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench.console.options import JsonOpt
from workbench.console.output import out


def open_(
    name: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="File, folder, hub id or web address.", show_default=False)],
    json: JsonOpt = False,
) -> None:
    """Say what a file, folder or hub id is, and print the commands that use it.

    Knows the files of this project, of trainers, mergekit, lm-eval and others. Opens no pickle and downloads nothing. Exits with 1 if the
    thing cannot be used as it is: the commands then convert it.
    """
    from workbench.api.opening import opened

    thing = opened(name)

    def text() -> None:
        out.say(f"{thing.name}: {thing.says}")
        if thing.problem:
            out.say(thing.problem)
        for command in thing.commands:
            out.line(command)

    out.result(lambda: thing, text, json=json)
    if thing.problem:
        raise typer.Exit(1)
