"""Command `methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli._options import JsonOpt
from workbench.cli._output import out
from workbench.errors import WorkbenchError, nearest


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method to explain: its fields, formula and paper.", show_default=False)
    ] = None,
    json: JsonOpt = False,
) -> None:
    """List the methods that steps can use, or explain one.

    Includes methods of installed distributions (entry point group workbench.methods) and, if the project is trusted, of its
    methods/ folder.
    """
    from workbench.project import find_project
    from workbench.recipe.describe import describe, summary
    from workbench.recipe.methods import methods as built_in
    from workbench.recipe.plugins import MethodFinder, untrusted

    finder = MethodFinder(find_project(Path.cwd() / "here"))
    known = [*built_in().values(), *finder.plugins.usable]
    for problem in finder.plugins.problems:
        out.warn(problem.message)
    unloaded = untrusted("not listed", finder.project) if finder.files and not finder.trusted else None
    if name is None:
        if json:
            out.json([describe(cls) for cls in known])
        else:
            rows = [[cls.verb, cls.name, cls.plugin.source if cls.plugin else "built in", summary(cls)] for cls in known]
            out.table(["verb", "method", "from", "what it does"], rows)
        if unloaded:
            out.say(f"{unloaded.message}. {unloaded.hint}")
        return
    matches = [cls for cls in known if name in (cls.name, cls.tag)]
    if not matches and unloaded:
        raise untrusted(f"unknown method '{name}'", finder.project)
    if not matches:
        raise WorkbenchError(
            f"unknown method '{name}'. {nearest(name, [cls.name for cls in known])}", "`workbench methods` lists all.", 2
        )
    document = describe(matches[0])
    if json:
        out.json(document)
        return
    out.line(f"{document['verb']}: {document['name']}\n{document['text']}\n")
    out.line(f"formula  {document['formula']}\npaper    {document['paper']}")
    if "plugin" in document:
        out.line(f"from     {document['plugin']['source']}")
    out.line("")
    out.table(["field", "default", "meaning"], [[f["name"], f["default"], f["text"]] for f in document["fields"]])
