"""The table of docs/mutation.md: how many mistakes the tests notice, by folder."""

from __future__ import annotations

from typing import Any

from cells import block, interval, table

MUTANTS = "benchmarks/results/mutants.json"


@block("mutants", MUTANTS)
def mutants_block(found: dict[str, Any]) -> str:
    """Write how many of the tried mistakes are noticed in each folder, with the interval of the share."""
    rows = [
        [
            f"`{row['room']}`",
            f"{row['lines']:,}",
            f"{row['possible']:,}",
            str(row["sampled"]),
            str(row["killed"] + row["timeout"]),
            str(row["survived"] + row["not_reached"]),
            str(row["equivalent"]),
            interval(row["score"]),
        ]
        for row in found["rows"]
    ]
    heads = ["folder", "lines", "possible", "tried", "noticed", "not noticed", "equivalent", "score"]
    note = "Scores in percent, without equivalents, with 95 % intervals of the sample."
    if any(row.get("again") for row in found["rows"]):
        note += " Survivors were tried again with more tests, some of them new: another sample may give less."
    return f"{table(heads, rows, left=1)}\n\n{note}"
