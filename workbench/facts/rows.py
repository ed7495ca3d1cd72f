"""Rows of a facts file as plain data with their places; the file is jsonl, YAML, or a JSON list as in published benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.errors import WorkbenchError, nearest

ACTION = "action"
"""Field of rows that are no facts but remove one; see `stream`."""
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


def has_action(row: FactRow) -> bool:
    """Return True if a row of the project's own format has the field `action`."""
    return isinstance(row.data, Mapping) and ACTION in row.data and "target_new" not in row.data


def read_rows(path: Path, label: str, expected: str) -> list[FactRow]:
    """Read the rows of a file, in order.

    Args:
        path: A `.yaml` or `.yml` file with a list, a `.json` file with a list or one value per line, or any other file with one JSON
            value per line.
        label: The file's name in messages.
        expected: A sentence with an example of a row, for hints.

    Raises:
        WorkbenchError: If there is no such file, or if its content is not UTF-8, not JSON or YAML, or not a list.
    """
    if path.is_dir():
        raise WorkbenchError(f"{label}: is a directory, expected a facts file", f"One of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise WorkbenchError(f"{label}: no such facts file", nearest(path.name, names) if names else None)
    if path.suffix in (".yaml", ".yml"):
        return _yaml_rows(path, label, expected)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{label}: not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _with_places(_parse_list(text, label), label)
    return [FactRow(number, f"{label}:{line}", data) for number, (line, data) in enumerate(_parse_lines(text, label), 1)]


def _yaml_rows(path: Path, label: str, expected: str) -> list[FactRow]:
    """Read the rows of a YAML list."""
    document = yamldoc.load(path, label)
    if not isinstance(document.data, list):
        raise WorkbenchError(f"{label}: expected a list of facts, found {type(document.data).__name__}", expected)
    return [FactRow(i + 1, f"{label}:{document.marks[(i,)][0]}", data) for i, data in enumerate(document.as_texts)]


def _parse_lines(text: str, label: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for every line of JSON that is not blank."""
    hint = "Write one object per line, or a list in a .json file: [{…}, {…}]."
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, jsondoc.parse(line, f"{label}:{number}", hint)


def _parse_list(text: str, label: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for every element of a JSON list."""
    decoder, line, counted_to = json.JSONDecoder(parse_constant=jsondoc.refuse_constant), 1, 0
    position = _skip_blank(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        line, counted_to = line + text.count("\n", counted_to, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except RecursionError:
            raise WorkbenchError(f"{label}:{line}: not JSON: nested too deeply", "A list of objects: [{…}, {…}].") from None
        except ValueError as error:
            raise WorkbenchError(f"{label}:{line}: not JSON: {error}", "A list of objects: [{…}, {…}].") from None
        jsondoc.check(value, text[position:end].encode("utf-8", "surrogatepass"), f"{label}:{line}")
        yield line, value
        position = _skip_blank(text, end)
        if text[position : position + 1] == ",":
            position = _skip_blank(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted_to, position)
            actual = repr(text[position : position + 10]) if position < len(text) else "the end of the file"
            raise WorkbenchError(f"{label}:{line}: expected , or ] after an entry, found {actual}", "The file may be incomplete.")


def _skip_blank(text: str, position: int) -> int:
    """Return the next position that is not white space."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _with_places(values: Iterator[tuple[int, Any]], label: str) -> list[FactRow]:
    """Return rows with unique places: the line if every row has its own line, else the number of the row."""
    entries = list(values)
    own_lines = len({line for line, _ in entries}) == len(entries)
    return [
        FactRow(number, f"{label}:{line}" if own_lines else f"{label}, row {number}", data)
        for number, (line, data) in enumerate(entries, 1)
    ]
