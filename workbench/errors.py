"""The one exception that users see."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any


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


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" sentence for a misspelt `name`, or the list of what is known.

    >>> nearest("densty", ["density", "lambda"])
    "Did you mean 'density'?"
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "Known: " + ", ".join(known) + "." if known else "None is known."


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
