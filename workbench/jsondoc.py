"""Read JSON from files that others wrote: UTF-8, bounded depth, no numbers that are none, every error with its file and place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError

MAX_DEPTH = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = f"nested too deeply (up to {MAX_DEPTH} levels)"
_HALF = "half a surrogate pair in a text"
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def text_of(path: Path, shown: str | None = None) -> str:
    """Read a text file. Raises WorkbenchError where it is not UTF-8, FileNotFoundError where it is missing."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{shown or path}: not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from None


def parse(text: bytes | str, shown: str, hint: str | None = None, *, infinite: bool = False, unique: bool = False) -> Any:
    """Parse one JSON value.

    Args:
        text: The file's bytes, or a line of it.
        shown: How errors call it: a file, or file:line.
        hint: What to do about a damaged file.
        infinite: Accept Infinity and NaN, which transformers writes into config.json.
        unique: Refuse a key that stands twice in one object.

    Raises:
        WorkbenchError: The text is not UTF-8 or not JSON, holds NaN or an infinity, more than 100 levels, half a surrogate pair or,
            if `unique`, a key twice.
    """
    try:
        raw, text = (text, text.decode("utf-8")) if isinstance(text, bytes) else (text.encode("utf-8"), text)
        found = json.loads(
            text,
            parse_constant=None if infinite else refuse_constant,
            parse_float=None if infinite else _finite,
            object_pairs_hook=_unique if unique else None,
        )
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{shown}: not JSON: not UTF-8 text (byte {error.start})", hint) from None
    except UnicodeEncodeError:
        raise WorkbenchError(f"{shown}: not JSON: {_HALF}", hint) from None
    except RecursionError:
        raise WorkbenchError(f"{shown}: not JSON: {_DEEP}", hint) from None
    except ValueError as error:
        raise WorkbenchError(f"{shown}: not JSON: {error}", hint) from None
    check(found, raw, shown, hint)
    return found


def check(found: Any, raw: bytes, shown: str, hint: str | None = None) -> None:
    """Raise WorkbenchError for parsed JSON that is nested too deeply, or has texts that cannot be stored.

    Args:
        found: The value.
        raw: The bytes that it was parsed from.
        shown: How errors call it.
        hint: What to do about it.
    """
    if _SURROGATE.search(raw):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError) as error:
            raise WorkbenchError(f"{shown}: not JSON: {_DEEP if isinstance(error, RecursionError) else _HALF}", hint) from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deep(found):
        raise WorkbenchError(f"{shown}: not JSON: {_DEEP}", hint)


def read(path: Path, shown: str | None = None, hint: str | None = None, *, infinite: bool = False, unique: bool = False) -> Any:
    """Read a JSON file; see `parse`. Raises FileNotFoundError where it is missing."""
    return parse(path.read_bytes(), shown or str(path), hint, infinite=infinite, unique=unique)


def read_object(
    path: Path, shown: str | None = None, hint: str | None = None, *, infinite: bool = False, unique: bool = False
) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read`."""
    return as_object(read(path, shown, hint, infinite=infinite, unique=unique), shown or str(path), hint)


def optional(path: Path, label: str = "") -> dict[str, Any]:
    """Read an object of a foreign file that may be missing: {} then. Raises WorkbenchError for a damaged one.

    Infinity passes: transformers writes it.
    """
    shown = f"{label}: {path}" if label else str(path)
    return read_object(path, shown, "Fetch the file again.", infinite=True) if path.is_file() else {}


def as_object(value: Any, shown: str, hint: str | None = None) -> dict[str, Any]:
    """Return the value, which must be an object. Raises WorkbenchError for anything else."""
    if not isinstance(value, dict):
        raise WorkbenchError(f"{shown}: found {kind(value)}, expected an object", hint)
    return value


def lines(path: Path, shown: str | None = None, hint: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every line of a jsonl file that is not blank.

    Raises:
        WorkbenchError: A line is not JSON; see `parse`. The message names the line.
    """
    shown = shown or str(path)
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, parse(line, f"{shown}:{number}", hint)


def kept(path: Path, expected: type = dict) -> Any:
    """Read what the workbench itself keeps in a cache; None where it is missing, damaged or of another kind, to be made again."""
    try:
        found = parse(path.read_bytes(), str(path), infinite=True)
    except (FileNotFoundError, NotADirectoryError, WorkbenchError):
        return None
    return found if isinstance(found, expected) else None


def kind(value: Any) -> str:
    """Name the kind of a JSON value in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _KINDS.get(type(value), "a number")


def refuse_constant(name: str) -> float:
    """Raise ValueError for NaN and infinities: `parse_constant` of a decoder."""
    raise ValueError(f"{name}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}, expected a number up to 1.8e308")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def is_deep(found: Any, levels: int = MAX_DEPTH) -> bool:
    """Return whether a value has more levels than the code that walks such data should recurse into."""
    level = [found]
    for _ in range(levels + 1):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
