"""The table of docs/concepts-runs.md: faults injected into commands."""

from __future__ import annotations

from typing import Any

from cells import block, table


@block("faults", "benchmarks/results/faults.json")
def faults_block(found: dict[str, Any]) -> str:
    """The cases that there are, those tried, and those that ended wrong."""
    sums = (f"{sum(row[key] for row in found['rows']):,}" for key in ("cases", "injected", "wrong"))
    told = "Cases: a call to the system that fails, is cut short, or ends the process. Wrong: another result than without the fault, or a file lost."
    return "\n\n".join([table(["commands", "cases", "tried", "wrong"], [[str(len(found["rows"])), *sums]], left=1), told])
