"""Markdown tables, and how numbers stand in their cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from workbench.ground.tables import markdown_rows

MISSING = "Not measured yet."
SIGNS = {
    "better": "+",
    "worse": "−",
    "equivalent": "=",
    "cannot tell": "?",
    "no item changed": "=",
    "safe": "✓",
    "not shown safe": "!",
}
SIGNED = "+ better, − worse, = equivalent or unchanged, ? cannot tell; on guarded tasks ✓ safe, ! not shown safe"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    """A Markdown table; the first `left` columns are left-aligned, the others right-aligned."""
    return "\n".join(markdown_rows(heads, rows, left))


def interval(found: Mapping[str, Any] | None) -> str:
    """A share in percent with its interval: "55 [42, 67]"; "withheld" where there is a reason instead."""
    if found and found.get("reason"):
        return "withheld"
    if not found or found.get("value") is None:
        return ""
    low, high = found.get("low"), found.get("high")
    return points(found["value"]) + ("" if low is None or high is None else f" [{points(low)}, {points(high)}]")


def points(value: float | None) -> str:
    """A share in percent, whole."""
    return "" if value is None else f"{round(100 * value)}".replace("-", "−")


def signed(value: float | None) -> str:
    """A difference in points."""
    return "" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def results(project: Path, name: str) -> dict[str, Any] | None:
    """A results file, if it is there."""
    path = project / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


BLOCKS: dict[str, Callable[[Path], str]] = {}
"""Function that writes a block of the pages, by the block's name."""


def block(name: str, source: str, *, cited: bool = True) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[Path], str]]:
    """Make a block of a page from a function of a results file, and register it.

    Args:
        name: Name of the block in the pages.
        source: The results file; where it is missing, the block says that nothing is measured.
        cited: Write at the end where the results were measured.
    """

    def register(write: Callable[[dict[str, Any]], str]) -> Callable[[Path], str]:
        @wraps(write)
        def written(project: Path) -> str:
            found = results(project, source)
            if found is None:
                return MISSING
            text = write(found)
            apart = "" if text.endswith(("\n", " ")) else " "
            return f"{text}{apart}{cite(found, source)}" if cited else text

        BLOCKS[name] = written
        return written

    return register


def cite(found: Mapping[str, Any], source: str) -> str:
    """Say on which machine results were measured, with a link to their file, which also has the command and the commit."""
    return f"{found['machine']}: [{source.rpartition('/')[2]}](../{source})."
