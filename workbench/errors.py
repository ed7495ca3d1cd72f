"""The one exception that users see, and what is skipped instead of raising it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
# Directions and separators that reorder or break what a terminal shows.
_CONTROLS |= {i: f"\\u{i:04x}" for i in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS |= {i: f"\\u{i:04x}" for i in range(0xD800, 0xE000)}
_LONG = 10_000
_NAME, _COMPARED, _LISTED = 100, 500, 200


class WorkbenchError(Exception):
    """Something the user can repair.

    Args:
        message: Where it happened, what was found, what was expected.
        hint: The command or edit that repairs it.
        exit_code: 1 for a user's error, 2 for an invalid recipe or usage, 3 for a failed gate.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


@dataclass(frozen=True)
class LeftOut:
    """A configuration that a command skips.

    Attributes:
        name: How it is called.
        reason: Why it is skipped.
        hint: What repairs that.
        error: What the command would end with if nothing else were left.
    """

    name: str
    reason: str
    hint: str | None = None
    error: WorkbenchError | None = field(default=None, compare=False)


def shell(*words: object) -> str:
    """Return words as a shell reads them: those with spaces or other signs are quoted, so that a printed command can be typed.

    >>> shell("recipes/my merge.yaml")
    "'recipes/my merge.yaml'"
    """
    return shlex.join(map(str, words))


def size(count: float) -> str:
    """Return a number of bytes for people, in a unit that leaves at least one digit: "512 B", "1.5 kB", "269 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def printable(text: str) -> str:
    """Return a text as a terminal may show it: control characters and halves of surrogate pairs escaped, newlines and tabs kept."""
    return text.translate(_CONTROLS)


def as_markdown(text: str) -> str:
    """Return a foreign text as one line of Markdown that neither leaves its place nor becomes a table cell, a link, code or HTML."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join(printable(text).split()))


def shortened(text: str) -> str:
    """Return a text that may hold foreign parts of any length, cut in the middle where it is over 10,000 characters."""
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]} … {text[-_LONG // 2 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" sentence for a misspelt `name`, or the list of what is known.

    >>> nearest("densty", ["density", "lambda"])
    "Did you mean 'density'?"
    """
    known = sorted(known)
    # Names from foreign files may be many and long, and difflib's time grows with the square of both.
    alike = [k for k in known if len(k) <= 2 * len(name) + 4][:_COMPARED] if len(name) <= _NAME else []
    close = get_close_matches(name, alike, n=2, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    listed = [k if len(k) <= _NAME else f"{k[:_NAME]}…" for k in known[:_LISTED]]
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return "Known: " + ", ".join(listed) + f"{more}." if known else "None is known."


def refuse_unknown(row: Mapping[Any, Any], known: Collection[str], place: str, what: str, exit_code: int = 1) -> None:
    """Refuse a row of data that has a field which nothing reads: a misspelt field would be ignored in silence.

    Args:
        row: The row.
        known: Fields that a row may have.
        place: file:line.
        what: What a row is: "a fact".
    """
    for key in row:
        if key not in known:
            near = nearest(str(key), known)
            fields = "" if near.startswith("Known: ") else f" Known: {', '.join(sorted(known))}."
            raise WorkbenchError(f"{place}: {what} has no field '{key}'", f"{near}{fields}", exit_code)


def refuse_misspelt(row: Mapping[Any, Any], known: Collection[str], place: str, exit_code: int = 1) -> None:
    """Refuse a row whose other fields are ignored, where one of them looks like a field that is read and that the row does not have.

    Args:
        row: The row.
        known: Fields that are read.
        place: file:line.
    """
    missing = [key for key in known if key not in row]
    for key in row:
        if key not in known and (near := get_close_matches(str(key), missing, n=1, cutoff=0.8)):
            raise WorkbenchError(
                f"{place}: the field '{key}' is not read",
                f"Did you mean '{near[0]}'? If not, rename it or take it out.",
                exit_code,
            )
