"""`methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench.cli._options import JsonOpt
from workbench.cli._output import out
from workbench.errors import WorkbenchError, nearest


def methods(
    name: Annotated[str | None, typer.Argument(help="A method: its fields, formula and paper.", show_default=False)] = None,
    json: JsonOpt = False,
) -> None:
    """List the methods that steps can use, or explain one."""
    from workbench.recipe.describe import describe, summary
    from workbench.recipe.methods import methods as registered

    known = registered()
    if name is None:
        if json:
            out.json([describe(cls) for cls in known.values()])
        else:
            out.table(["verb", "method", "what it does"], [[cls.verb, cls.name, summary(cls)] for cls in known.values()])
        return
    found = [cls for tag, cls in known.items() if name in (cls.name, tag)]
    if not found:
        raise WorkbenchError(
            f"unknown method '{name}'. {nearest(name, [cls.name for cls in known.values()])}", "`workbench methods` lists all.", 2
        )
    document = describe(found[0])
    if json:
        out.json(document)
        return
    out.line(f"{document['verb']}: {document['name']}\n{document['text']}\n")
    out.line(f"formula  {document['formula']}\npaper    {document['paper']}\n")
    out.table(["field", "default", "meaning"], [[f["name"], f["default"], f["text"]] for f in document["fields"]])
