"""Table of what configurations cost, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.cli._output import out

Row = Mapping[str, Any]


def costs_rows(document: Row, pair: tuple[str, str] | None) -> list[dict[str, Any]]:
    """Return the costs of the configurations of a comparison.

    Args:
        document: The comparison.
        pair: Names of the two configurations that are asked for; default: all that the rows name, and the baseline.
    """
    names = set(pair or ()) or {document["baseline"], *(r["configuration"] for r in document["rows"])}
    return [{"configuration": c["name"], **c["costs"]} for c in document["configurations"] if c["name"] in names]


def costs_table(costs: Sequence[Row]) -> None:
    """Print one row per configuration, and below the table why a number is not known."""
    from workbench.report.costs import HEADS, cells, unknown

    out.line("")
    out.table(
        ["configuration", *(head.lower() for head in HEADS)],
        [[c["configuration"], *(cell.text for cell in cells(c))] for c in costs],
        right=range(1, len(HEADS)),
    )
    counted = list(dict.fromkeys(c["peak_of"] for c in costs if c["peak_of"]))
    if counted:
        out.say(f"peak memory while a task is scored: {'; '.join(counted)}")
    for sentence in unknown([{"name": c["configuration"], "costs": c} for c in costs]):
        out.say(sentence)
