"""Commands `facts import` and, of a part, `facts check`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.console.options import FactsArg, JsonOpt
from workbench.console.output import out
from workbench.ground.errors import WorkbenchError, shell

if TYPE_CHECKING:
    from workbench.facts.published import Published

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check facts files, and convert published datasets.")
SHOWN = 10


@app.command("import")
def import_(
    file: FactsArg,
    to: Annotated[Path | None, typer.Option("-o", "--out", help="JSONL file to write; default: print the facts.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Convert only the first N facts.")] = None,
    neighbours: Annotated[
        int,
        typer.Option(
            "--rebuild-neighbours",
            min=0,
            metavar="N",
            help="Add neighbours up to N per fact: other subjects of the file with the same relation and true answer that are not edited.",
        ),
    ] = 0,
    json: JsonOpt = False,
) -> None:
    """Convert a published facts dataset to JSONL, and list skipped rows."""
    from workbench.facts.conflicts import ImportedFacts, import_facts
    from workbench.facts.facts import write_facts

    out.quiet = json
    if to is not None and to.exists():
        raise WorkbenchError(f"{to}: already exists", "Choose another name: existing files are not overwritten.")
    read = import_facts(file, str(file), limit, neighbours)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_facts(to, read.facts)

    imported = ImportedFacts(format=read.format, facts=len(read.facts), out=str(to) if to else None, skipped=read.skipped)

    def text() -> None:
        for line in [str(to)] if to is not None else [dumps(fact.document(), ensure_ascii=False) for fact in read.facts]:
            out.line(line)
        _say_imported(read, file, neighbours, limited=limit is not None)
        if to is not None:
            out.say(f"next: workbench facts check {shell(to)}")

    out.result(lambda: imported, text, json=json)


def _say_imported(read: Published, file: Path, neighbours: int, *, limited: bool) -> None:
    """Print the skipped rows, the number of facts, and the number of their neighbours."""
    from workbench.facts.conflicts import LONG, LONG_REPAIR

    for skip in read.skipped[:SHOWN]:
        out.say(f"skipped: {skip.place}: {skip.reason}")
    more = len(read.skipped) - SHOWN
    out.say(
        f"{len(read.facts)} facts of {file} ({read.format}), {len(read.skipped)} skipped"
        + ("; --json lists all" if more > 0 else "")
    )
    if long := sum(len(fact.target) > LONG for fact in read.facts):
        out.say(
            f"{long} targets have more than {LONG} characters, which closed-form methods rarely say as a whole. {LONG_REPAIR}"
        )
    if neighbours:
        full = sum(len(fact.neighbours) >= neighbours for fact in read.facts)
        total = sum(len(fact.neighbours) for fact in read.facts)
        hint = ". All facts of the file are edited, which leaves few subjects as neighbours; --limit leaves more"
        out.say(f"{total} neighbours; {full} facts have {neighbours} or more{'' if limited else hint}")
