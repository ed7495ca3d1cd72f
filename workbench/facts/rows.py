"""Rows of a facts file as plain data with their places; the file is jsonl, YAML, or a JSON list as in published benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.errors import WorkbenchError, nearest

SUFFIXES = (".jsonl", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class FactRow:
    """One entry of a file.

    Attributes:
        number: Number of the row, starting at 1.
        place: file:line, or the row's number if several rows share a line.
        data: The row's unchecked content, of any type.
    """

    number: int
    place: str
    data: Any


def read_rows(path: Path, shown: str, expected: str) -> list[FactRow]:
    """Read the rows of a file, in order.

    Args:
        path: A `.yaml` or `.yml` file with a list, a `.json` file with a list or one value per line, or any other file with one JSON
            value per line.
        shown: The file's name in messages.
        expected: A sentence with an example of a row, for hints.

    Raises:
        WorkbenchError: If there is no such file, or if its content is not UTF-8, not JSON or YAML, or not a list.
    """
    if path.is_dir():
        raise WorkbenchError(f"{shown}: is a directory, expected a facts file", f"One of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise WorkbenchError(f"{shown}: no such facts file", nearest(path.name, near) if near else None)
    if path.suffix in (".yaml", ".yml"):
        return _of_yaml(path, shown, expected)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{shown}: not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _numbered(_of_list(text, shown), shown)
    return [FactRow(number, f"{shown}:{line}", data) for number, (line, data) in enumerate(_of_lines(text, shown), 1)]


def _of_yaml(path: Path, shown: str, expected: str) -> list[FactRow]:
    document = yamldoc.load(path, shown)
    if not isinstance(document.data, list):
        raise WorkbenchError(f"{shown}: expected a list of facts, found {type(document.data).__name__}", expected)
    return [FactRow(i + 1, f"{shown}:{document.marks[(i,)][0]}", data) for i, data in enumerate(document.as_texts)]


def _of_lines(text: str, shown: str) -> Iterator[tuple[int, Any]]:
    hint = "Write one object per line, or a list in a .json file: [{…}, {…}]."
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, jsondoc.parse(line, f"{shown}:{number}", hint)


def _of_list(text: str, shown: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for every element of a JSON list."""
    decoder, line, before = json.JSONDecoder(parse_constant=jsondoc.refuse_constant), 1, 0
    at = _blank(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, before = line + text.count("\n", before, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise WorkbenchError(f"{shown}:{line}: not JSON: nested too deeply", "A list of objects: [{…}, {…}].") from None
        except ValueError as error:
            raise WorkbenchError(f"{shown}:{line}: not JSON: {error}", "A list of objects: [{…}, {…}].") from None
        jsondoc.check(value, text[at:end].encode("utf-8", "surrogatepass"), f"{shown}:{line}")
        yield line, value
        at = _blank(text, end)
        if text[at : at + 1] == ",":
            at = _blank(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", before, at)
            actual = repr(text[at : at + 10]) if at < len(text) else "the end of the file"
            raise WorkbenchError(f"{shown}:{line}: expected , or ] after an entry, found {actual}", "The file may be incomplete.")


def _blank(text: str, at: int) -> int:
    """Return the next position that is not white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _numbered(values: Iterator[tuple[int, Any]], shown: str) -> list[FactRow]:
    """Return rows with unique places: the line if every row has its own line, else the number of the row."""
    entries = list(values)
    own_lines = len({line for line, _ in entries}) == len(entries)
    return [
        FactRow(number, f"{shown}:{line}" if own_lines else f"{shown}, row {number}", data)
        for number, (line, data) in enumerate(entries, 1)
    ]
