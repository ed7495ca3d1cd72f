"""Reading of facts files in the project's own format and in the formats of published benchmarks."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import WorkbenchError, shell
from workbench.facts.facts import EXPECTED, Fact, fact_of
from workbench.facts.published import Published, convert, format_of
from workbench.facts.rows import ACTION, has_action, read_rows


def read_facts(path: Path, label: str) -> list[Fact]:
    """Read the facts of a file, in order; a repeated fact counts once.

    Args:
        path: A file with one JSON object per line, a YAML list of mappings, or a published benchmark (see `published`). Rows of a
            benchmark without a usable fact are skipped.
        label: The file's name in messages.

    Raises:
        WorkbenchError: If the file is missing or not JSON or YAML; if a field is missing, empty or (in the project's own format)
            unknown; if a subject is not in its prompt exactly once; if a prompt has two targets; if two facts have the same id; or if
            there are no facts. The message names file and line.
    """
    read = read_all(path, label)
    facts: dict[str, Fact] = {}
    ids: dict[str, Fact] = {}
    for fact in read.facts:
        first = facts.get(fact.text)
        if first is not None and first.target != fact.target:
            is_published = read.format != "facts"
            raise WorkbenchError(
                f"{fact.place}: same prompt as {first.place}, but another target ({fact.target!r} instead of {first.target!r})",
                f"`workbench facts import {shell(label)} -o FILE.jsonl` skips the later row."
                if is_published
                else "Keep one target per prompt, or edit with `mode: {sequential: {batch: N}}`, where a later row updates the fact.",
            )
        if first is not None:
            continue
        if fact.id in ids:
            raise WorkbenchError(f"{fact.place}: same id '{fact.id}' as {ids[fact.id].place}", "Give every fact its own id.")
        ids[fact.id] = facts[fact.text] = fact
    return list(facts.values())


def read_all(path: Path, label: str) -> Published:
    """Read every fact of a file, including those that contradict or repeat another one, for checks and conversion.

    Args:
        path: The file; see `read_facts`.
        label: The file's name in messages.

    Raises:
        WorkbenchError: As in `read_facts`, except for errors that concern two facts.
    """
    read = _read(path, label)
    if read.facts:
        return read
    if read.skipped:
        first = read.skipped[0]
        raise WorkbenchError(
            f"{label}: no facts; {len(read.skipped)} rows skipped, first {first.place}: {first.reason}",
            f"Its rows were read as {read.format}: `workbench facts import {shell(label)} -o FILE.jsonl` lists every reason.",
        )
    raise WorkbenchError(
        f"{label}: no facts", 'Add lines such as {"prompt": "The capital of Atlantis is", "target": "Poseidonis"}'
    )


def _read(path: Path, label: str) -> Published:
    """Read every fact of a file in the project's own format or a published one."""
    rows = read_rows(path, label, EXPECTED)
    name = format_of(rows)
    for row in rows:
        if has_action(row) and not name:
            raise WorkbenchError(
                f"{row.place}: '{ACTION}' changes an earlier fact, but this file is not read in order here",
                "Edit steps with `mode: {sequential: {batch: N}}` and `workbench facts check --stream` read a file in order.",
            )
    return convert(rows, name) if name else Published([fact_of(row.data, row.place) for row in rows], [], "facts")
