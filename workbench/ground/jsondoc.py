"""Read JSON from untrusted files: UTF-8 only, limited depth, finite numbers, and errors that name the file and the place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError

MAX_DEPTH = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = f"nested too deeply (up to {MAX_DEPTH} levels)"
_HALF = "an unpaired surrogate in a string"
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def text_of(path: Path, label: str | None = None) -> str:
    """Read a text file; a byte order mark is removed and line ends become newlines.

    Args:
        path: The file.
        label: The file's name in messages; None takes the path.

    Raises:
        WorkbenchError: If the file is not UTF-8.
        FileNotFoundError: If there is no such file.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{label or path}: not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from None


def parse(text: bytes | str, label: str, hint: str | None = None, *, infinite: bool = False, unique: bool = False) -> Any:
    """Parse one JSON value.

    Args:
        text: The file's bytes, or one of its lines.
        label: The text's name in messages: a file, or file:line.
        hint: The hint for a damaged file.
        infinite: Accept Infinity and NaN, which transformers writes into config.json.
        unique: Refuse an object with duplicate keys.

    Raises:
        WorkbenchError: If the text is not UTF-8 or not JSON, holds NaN or an infinity, has more than 100 levels, an unpaired surrogate
            or, with `unique`, a duplicate key.
    """
    try:
        raw, text = (text, text.decode("utf-8")) if isinstance(text, bytes) else (text.encode("utf-8"), text)
        value = json.loads(
            text,
            parse_constant=None if infinite else refuse_constant,
            parse_float=None if infinite else _finite,
            object_pairs_hook=_unique if unique else None,
        )
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{label}: not JSON: not UTF-8 text (byte {error.start})", hint) from None
    except UnicodeEncodeError:
        raise WorkbenchError(f"{label}: not JSON: {_HALF}", hint) from None
    except RecursionError:
        raise WorkbenchError(f"{label}: not JSON: {_DEEP}", hint) from None
    except ValueError as error:
        raise WorkbenchError(f"{label}: not JSON: {error}", hint) from None
    check(value, raw, label, hint)
    return value


def check(value: Any, raw: bytes, label: str, hint: str | None = None) -> None:
    """Check that parsed JSON is not nested too deeply and that its strings can be stored as UTF-8.

    Args:
        value: The value.
        raw: The bytes that the value was parsed from.
        label: The value's name in messages.
        hint: The hint for a damaged file.

    Raises:
        WorkbenchError: If the value has more than 100 levels or a string with an unpaired surrogate.
    """
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError) as error:
            raise WorkbenchError(f"{label}: not JSON: {_DEEP if isinstance(error, RecursionError) else _HALF}", hint) from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deep(value):
        raise WorkbenchError(f"{label}: not JSON: {_DEEP}", hint)


def read(path: Path, label: str | None = None, hint: str | None = None, *, infinite: bool = False, unique: bool = False) -> Any:
    """Read a JSON file; for the arguments see `parse`. `label` is by default the path.

    Args:
        path: The file.
        label: The file's name in messages; None takes the path.
        hint: The hint for a damaged file.
        infinite: Accept Infinity and NaN.
        unique: Refuse an object with duplicate keys.

    Raises:
        WorkbenchError: If the file's content is invalid; see `parse`.
        FileNotFoundError: If there is no such file.
    """
    return parse(path.read_bytes(), label or str(path), hint, infinite=infinite, unique=unique)


def read_object(
    path: Path, label: str | None = None, hint: str | None = None, *, infinite: bool = False, unique: bool = False
) -> dict[str, Any]:
    """Read a JSON file that holds an object; for the arguments see `read`."""
    return as_object(read(path, label, hint, infinite=infinite, unique=unique), label or str(path), hint)


def optional(path: Path, label: str = "") -> dict[str, Any]:
    """Read a JSON object from an untrusted file that may be missing; return {} then.

    Args:
        path: The file.
        label: Owner of the file, put before its path in messages.

    Raises:
        WorkbenchError: If the file is damaged. Infinity and NaN are accepted, since transformers writes them.
    """
    owner_and_path = f"{label}: {path}" if label else str(path)
    return read_object(path, owner_and_path, "Download the file again.", infinite=True) if path.is_file() else {}


def as_object(value: Any, label: str, hint: str | None = None) -> dict[str, Any]:
    """Return a JSON value if it is an object.

    Raises:
        WorkbenchError: If the value is not an object.
    """
    if not isinstance(value, dict):
        raise WorkbenchError(f"{label}: found {kind(value)}, expected an object", hint)
    return value


def lines(path: Path, label: str | None = None, hint: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) for every line of a jsonl file that is not blank; for the arguments see `read`.

    Args:
        path: The file.
        label: The file's name in messages; None takes the path.
        hint: The hint for a damaged line.

    Raises:
        WorkbenchError: If a line is invalid; see `parse`. The message names the line.
    """
    label = label or str(path)
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, parse(line, f"{label}:{number}", hint)


def read_cached(path: Path, expected: type = dict) -> Any:
    """Read a JSON value from the workbench's cache; return None if it is missing, damaged or not of the expected type."""
    try:
        cached = parse(path.read_bytes(), str(path), infinite=True)
    except (FileNotFoundError, NotADirectoryError, WorkbenchError):
        return None
    return cached if isinstance(cached, expected) else None


def kind(value: Any) -> str:
    """Describe the type of a JSON value in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _KINDS.get(type(value), "a number")


def refuse_constant(name: str) -> float:
    """Refuse NaN and infinities, as `parse_constant` of a JSON decoder.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{name}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}, expected a number up to 1.8e308")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {duplicate[:80]!r}")
    return value


def is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Return whether a JSON value is nested more deeply than `levels`."""
    level = [value]
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
