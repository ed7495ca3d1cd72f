"""Markdown tables, and how numbers stand in their cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from workbench.tables import markdown_rows

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


def measured(found: Mapping[str, Any]) -> str:
    """By which command, where and when a results file was measured."""
    said = [f"Measured by `{found['command']}` on {found['machine']}, commit {found['commit'][:12]}."]
    for one in found.get("later", ()):
        said.append(f"The rows {', '.join(one['rows'])}: `{one['command']}` on {one['machine']}, commit {one['commit'][:12]}.")
    return " ".join(said)


def results(project: Path, name: str) -> dict[str, Any] | None:
    """A results file, if it is there."""
    path = project / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def of_results(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[Path], str]]:
    """Make a block of a page from a function of a results file; where the file is missing, the block says that nothing is measured."""

    def block(write: Callable[[dict[str, Any]], str]) -> Callable[[Path], str]:
        @wraps(write)
        def written(project: Path) -> str:
            found = results(project, name)
            return MISSING if found is None else write(found)

        return written

    return block
