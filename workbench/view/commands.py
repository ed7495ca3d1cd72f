"""Command `view`."""

from __future__ import annotations

import sys
from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

from workbench.console.options import DeviceOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, shell


@reads_recipes
def view(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A project's folder; default: the current folder's project.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port; default: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the address in a browser, on a terminal.")] = True,
    device: DeviceOpt = "auto",
) -> None:
    """Show a project in the browser: recipes, runs, scores, searches, work in progress, and a chat side by side.

    Serves pages on 127.0.0.1, to those who open the printed address, until Ctrl-C. They change nothing and load nothing from the
    network.
    """
    from workbench.ground.project import find_project
    from workbench.view.app import application
    from workbench.view.pages import Site
    from workbench.view.server import Served
    from workbench.view.talk import Talk

    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", shell("workbench", "view", "DIR"))
    project = find_project(folder / "here" if folder else None)
    with chdir(project), Served(application(Site(), talk=Talk(device)), port) as served:
        out.line(served.url)
        out.say("Ctrl-C ends the viewer")
        if browser and on_terminal():
            import webbrowser

            webbrowser.open(served.url)
        try:
            served.wait()
        except KeyboardInterrupt:
            out.say("the viewer has ended")


def on_terminal() -> bool:
    """Return True if someone sees what the command prints."""
    return sys.stdout.isatty()
