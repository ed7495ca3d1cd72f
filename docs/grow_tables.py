"""Tables of docs/growing.md: what growth costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cells import MISSING, measured, results, table

COST = "benchmarks/results/grow-M.json"


def cost_block(project: Path) -> str:
    """Bytes, seconds and memory of every operator, beside the floor and mergekit."""
    found = results(project, COST)
    if found is None:
        return MISSING
    rows = []
    for row in found["rows"]:
        ours, theirs = row["ours"], row.get("mergekit")
        rows.append([row["operator"], _giga(row["bytes"]), f"{ours['cpu']:.1f}", f"{row['floor']['cpu']:.1f}", _giga(ours["peak"]),
                     f"{theirs['cpu']:.1f}" if theirs else "", _giga(theirs["peak"]) if theirs else "", f"{row['ratio']:.1f}" if theirs else ""])  # fmt: skip
    heads = [
        "operator",
        "writes, GB",
        "CPU s",
        "reading and writing alone, CPU s",
        "peak, GB",
        "mergekit, CPU s",
        "mergekit, peak, GB",
        "ratio of CPU s",
    ]
    note = f"The base has {_giga(found['base_bytes'])} GB; one core, `check: off`, start-up included. {measured(found)} The source: [{COST}](../{COST})."
    return table(heads, rows, left=1) + f"\n\n{note}"


def _giga(count: float) -> str:
    return f"{count / 1e9:.2f}"


BLOCKS: dict[str, Callable[[Path], str]] = {"grow-cost": cost_block}
