"""The one exception that users see."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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


def size(count: float) -> str:
    """Return a number of bytes for people, in a unit that leaves at least one digit: "512 B", "1.5 kB", "269 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


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
