"""The exception that users see, the record of a skipped configuration, and functions that format text for messages."""

from __future__ import annotations

import copy
import errno
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self

_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
# Unicode characters for text direction and line separation, which reorder or break a terminal's output.
_CONTROLS |= {i: f"\\u{i:04x}" for i in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS |= {i: f"\\u{i:04x}" for i in range(0xD800, 0xE000)}
_LONG = 10_000
_NAME, _COMPARED, _LISTED = 100, 500, 200


class WorkbenchError(Exception):
    """An error that the user can repair. `workbench` prints it without a traceback and exits with its exit code.

    Args:
        message: The place of the error, what was found there and what was expected.
        hint: The command or edit that repairs it.

    Attributes:
        exit_code: Exit code of the command, which a subclass sets.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def reworded(self, message: str, hint: str | None = None) -> Self:
        """Return an error of the same class and with the same attributes, but with another message and hint."""
        other = copy.copy(self)
        other.args, other.message, other.hint = (message,), message, hint
        return other

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


class UsageError(WorkbenchError):
    """The command line is wrong: an option, an argument, or a combination of them."""

    exit_code = 2


class InvalidRecipeError(WorkbenchError):
    """A recipe, or a file that it names, is invalid; or a step asks for something that its base does not have."""

    exit_code = 2


class GateFailedError(WorkbenchError):
    """A check of a result failed: a gate of a step, a comparison with the recorded digests, or a check of a suite or of facts."""

    exit_code = 3


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


def refuses_memory(error: BaseException) -> bool:
    """Return True if an error says that the system or a device has no more memory, whichever library raises it."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a device
        or (isinstance(error, ImportError) and "map segment" in text)
        or getattr(error, "errno", None) == errno.ENOMEM
        or "DefaultCPUAllocator" in text
        or ("unable to mmap" in text and os.strerror(errno.ENOMEM) in text)  # torch, for a safetensors file
    )


def shell(*words: object) -> str:
    """Return words as one shell command to paste, quoted where necessary, with the `--runs-dir` of this command line.

    >>> shell("recipes/my merge.yaml")
    "'recipes/my merge.yaml'"
    """
    place = RUNS_DIR.get()
    if place is not None and words[0] == "workbench" and "--runs-dir" not in words and TAKE_RUNS.intersection(words[1:2]):
        words = (*words, "--runs-dir", place)
    return shlex.join(map(str, words))


RUNS_DIR: ContextVar[Path | None] = ContextVar("runs_dir", default=None)
"""The value of `--runs-dir` on this command line; None if it was not typed."""
TAKE_RUNS = frozenset(("chat", "compare", "eval", "export", "plan", "push", "report", "run", "runs", "search", "ship"))
"""Commands with `--runs-dir` whose lines are printed."""


def size(count: float) -> str:
    """Format a number of bytes in a readable unit: "512 B", "1.5 kB", "269 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def duration(seconds: float) -> str:
    """Format a time: "40 s", "6 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def printable(text: str) -> str:
    """Escape control characters and unpaired surrogates in a text; newlines and tabs stay."""
    return text.translate(_CONTROLS)


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
    lower = {k.lower(): k for k in candidates}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=2, cutoff=0.6)]
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    listed = [k if len(k) <= _NAME else f"{k[:_NAME]}…" for k in known[:_LISTED]]
    remainder = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return "Known: " + ", ".join(listed) + f"{remainder}." if known else "None is known."


def refuse_unknown(
    row: Mapping[Any, Any], known: Collection[str], place: str, what: str, error: type[WorkbenchError] = WorkbenchError
) -> None:
    """Raise an error if a row of data has an unknown field, which would otherwise be ignored silently.

    Args:
        row: The row.
        known: The fields that a row may have.
        place: file:line, for the message.
        what: Description of a row for the message, such as "a fact".
        error: Class of the error to raise.

    Raises:
        WorkbenchError: If the row has a field that is not in `known`.
    """
    for key in row:
        if key not in known:
            suggestion = nearest(str(key), known)
            fields = "" if suggestion.startswith("Known: ") else f" Known: {', '.join(sorted(known))}."
            raise error(f"{place}: {what} has no field '{key}'", f"{suggestion}{fields}")


def refuse_misspelt(
    row: Mapping[Any, Any], known: Collection[str], place: str, error: type[WorkbenchError] = WorkbenchError
) -> None:
    """Raise an error if an ignored field of a row looks like a misspelling of a known field that the row lacks.

    Raises:
        WorkbenchError: If a field of the row is similar to a missing known field.
    """
    missing = [key for key in known if key not in row]
    for key in row:
        if key not in known and (near := get_close_matches(str(key), missing, n=1, cutoff=0.8)):
            raise error(
                f"{place}: the field '{key}' is not read",
                f"Did you mean '{near[0]}'? If not, rename it or take it out.",
            )
