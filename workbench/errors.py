"""The exception that users see, the record of a skipped configuration, and functions that format text for messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
# Unicode characters for text direction and line separation, which reorder or break a terminal's output.
_CONTROLS |= {i: f"\\u{i:04x}" for i in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS |= {i: f"\\u{i:04x}" for i in range(0xD800, 0xE000)}
_LONG = 10_000
_NAME, _COMPARED, _LISTED = 100, 500, 200


class WorkbenchError(Exception):
    """An error that the user can repair.

    Args:
        message: The place of the error, what was found there and what was expected.
        hint: The command or edit that repairs it.
        exit_code: 1 for a user's error, 2 for an invalid recipe or wrong usage, 3 for a failed gate.
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
        name: The configuration's name.
        reason: The reason for skipping it.
        hint: The command or edit that repairs it.
        error: The error to raise if no other configuration is left.
    """

    name: str
    reason: str
    hint: str | None = None
    error: WorkbenchError | None = field(default=None, compare=False)


def shell(*words: object) -> str:
    """Return words as one shell command, quoted where necessary, so that a printed command can be pasted.

    >>> shell("recipes/my merge.yaml")
    "'recipes/my merge.yaml'"
    """
    return shlex.join(map(str, words))


def size(count: float) -> str:
    """Format a number of bytes in a readable unit: "512 B", "1.5 kB", "269 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def printable(text: str) -> str:
    """Escape control characters and unpaired surrogates in a text; newlines and tabs stay."""
    return text.translate(_CONTROLS)


def as_markdown(text: str) -> str:
    """Escape an untrusted text for one line of Markdown, so that it cannot become a table cell, a link, code or HTML."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join(printable(text).split()))


def shortened(text: str) -> str:
    """Cut the middle out of a text longer than 10,000 characters."""
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]} … {text[-_LONG // 2 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a "Did you mean" sentence for a misspelled name, or the list of known names if none is similar.

    >>> nearest("densty", ["density", "lambda"])
    "Did you mean 'density'?"
    """
    known = sorted(known)
    # Names from untrusted files can be many and long, and difflib takes time quadratic in both.
    candidates = [k for k in known if len(k) <= 2 * len(name) + 4][:_COMPARED] if len(name) <= _NAME else []
    close = get_close_matches(name, candidates, n=2, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    listed = [k if len(k) <= _NAME else f"{k[:_NAME]}…" for k in known[:_LISTED]]
    remainder = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return "Known: " + ", ".join(listed) + f"{remainder}." if known else "None is known."


def refuse_unknown(row: Mapping[Any, Any], known: Collection[str], place: str, what: str, exit_code: int = 1) -> None:
    """Raise an error if a row of data has an unknown field, which would otherwise be ignored silently.

    Args:
        row: The row.
        known: The fields that a row may have.
        place: file:line, for the message.
        what: Description of a row for the message, such as "a fact".
        exit_code: Exit code of the error.

    Raises:
        WorkbenchError: If the row has a field that is not in `known`.
    """
    for key in row:
        if key not in known:
            suggestion = nearest(str(key), known)
            fields = "" if suggestion.startswith("Known: ") else f" Known: {', '.join(sorted(known))}."
            raise WorkbenchError(f"{place}: {what} has no field '{key}'", f"{suggestion}{fields}", exit_code)


def refuse_misspelt(row: Mapping[Any, Any], known: Collection[str], place: str, exit_code: int = 1) -> None:
    """Raise an error if an ignored field of a row looks like a misspelling of a known field that the row lacks.

    Args:
        row: The row; it may have other fields.
        known: The fields that are read.
        place: file:line, for the message.
        exit_code: Exit code of the error.

    Raises:
        WorkbenchError: If a field of the row is similar to a missing known field.
    """
    missing = [key for key in known if key not in row]
    for key in row:
        if key not in known and (near := get_close_matches(str(key), missing, n=1, cutoff=0.8)):
            raise WorkbenchError(
                f"{place}: the field '{key}' is not read",
                f"Did you mean '{near[0]}'? If not, rename it or take it out.",
                exit_code,
            )
