"""Facts files: the project's own format, and published ones as they lie."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import WorkbenchError, shell
from workbench.facts.facts import EXPECTED, Fact, fact_of
from workbench.facts.published import Published, convert, format_of
from workbench.facts.rows import read_rows


def read_facts(path: Path, shown: str) -> list[Fact]:
    """The facts of a file, in its order.

    Args:
        path: The file: one JSON object a line, a YAML list of mappings, or a published benchmark (see `published`), whose rows
            without a usable fact are left out.
        shown: How errors call it.

    Errors, each with file and line: missing file, not JSON, a missing, empty or unknown field (unknown ones only in the project's own format), a subject that is not in the prompt or
    more than once, two targets for one prompt, two facts of one id, no facts. The same fact twice counts once.
    """
    read = read_all(path, shown)
    facts: dict[str, Fact] = {}
    ids: dict[str, Fact] = {}
    for fact in read.facts:
        first = facts.get(fact.text)
        if first is not None and first.target != fact.target:
            lies = read.format != "facts"
            raise WorkbenchError(
                f"{fact.place}: the prompt of {first.place} again, with another target ({first.target!r}, here {fact.target!r})",
                f"`workbench facts import {shell(shown)} -o FILE.jsonl` leaves the later row out."
                if lies
                else "Keep one target a prompt.",
            )
        if first is not None:
            continue
        if fact.id in ids:
            raise WorkbenchError(f"{fact.place}: the id '{fact.id}' of {ids[fact.id].place} again", "Give every fact its own id.")
        ids[fact.id] = facts[fact.text] = fact
    return list(facts.values())


def read_all(path: Path, shown: str) -> Published:
    """Every fact of a file as it stands there, also those that contradict or repeat another one: for checks and conversion.

    Args and errors: as `read_facts`, without those that concern two facts.
    """
    read = _read(path, shown)
    if read.facts:
        return read
    if read.skipped:
        first = read.skipped[0]
        raise WorkbenchError(
            f"{shown}: no facts; {len(read.skipped)} rows skipped, first {first.place}: {first.reason}",
            f"Its rows were read as {read.format}: `workbench facts import {shell(shown)} -o FILE.jsonl` lists every reason.",
        )
    raise WorkbenchError(
        f"{shown}: no facts", 'Add lines such as {"prompt": "The capital of Atlantis is", "target": "Poseidonis"}'
    )


def _read(path: Path, shown: str) -> Published:
    rows = read_rows(path, shown, EXPECTED)
    name = format_of(rows)
    return convert(rows, name) if name else Published([fact_of(row.data, row.place) for row in rows], [], "facts")
