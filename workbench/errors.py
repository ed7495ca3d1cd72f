"""The one exception that users see, and what is skipped instead of raising it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
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
