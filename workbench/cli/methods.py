"""Command `methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli._options import JsonOpt
from workbench.cli._output import out
from workbench.errors import UsageError, nearest

if TYPE_CHECKING:
    from workbench.cli.documents.methods import MethodDocument


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
    from workbench.cli.documents.methods import MethodDocument
    from workbench.project import find_project
    from workbench.recipe.describe import describe, summary
    from workbench.recipe.methods import MethodFinder, untrusted
    from workbench.recipe.methods import methods as built_in

    finder = MethodFinder(find_project())
    known = [*built_in().values(), *finder.plugins.usable]
    for problem in finder.plugins.problems:
        out.warn(problem.message)
    unloaded = untrusted("not listed", finder.project) if finder.files and not finder.trusted else None
    if name is None:
        rows = [[cls.verb, cls.name, cls.plugin.source if cls.plugin else "built in", summary(cls)] for cls in known]
        out.result(
            lambda: [MethodDocument.model_validate(describe(cls)) for cls in known],
            lambda: out.table(["verb", "method", "from", "what it does"], rows),
            json=json,
        )
        if unloaded:
            out.say(f"{unloaded.message}. {unloaded.hint}")
        return
    matches = [cls for cls in known if name in (cls.name, cls.tag)]
    if not matches and unloaded:
        raise untrusted(f"unknown method '{name}'", finder.project)
    if not matches:
        raise UsageError(
            f"unknown method '{name}'. {nearest(name, [cls.name for cls in known])}", "`workbench methods` lists all."
        )
    document = MethodDocument.model_validate(describe(matches[0]))
    out.result(lambda: document, lambda: _print(document), json=json)


def _print(method: MethodDocument) -> None:
    """Print a method's text, formula, paper and fields."""
    out.line(f"{method.verb}: {method.name}\n{method.text}\n")
    out.line(f"formula  {method.formula}\npaper    {method.paper}")
    if method.plugin:
        out.line(f"from     {method.plugin.source}")
    out.line("")
    out.table(["field", "default", "meaning"], [[f.name, f.default, f.text] for f in method.fields])
