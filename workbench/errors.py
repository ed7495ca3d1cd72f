"""The one exception that users see."""

from __future__ import annotations

import re
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


_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
# Directions and separators that reorder or break what a terminal shows.
_CONTROLS |= {i: f"\\u{i:04x}" for i in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS |= {i: f"\\u{i:04x}" for i in range(0xD800, 0xE000)}
_LONG = 10_000
_NAME, _COMPARED, _LISTED = 100, 500, 200


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
