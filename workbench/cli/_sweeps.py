"""Sweeps for the terminal: one table a measure, with the swept number down and the other fields across."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.cli._output import out


def sweep_tables(document: Mapping[str, Any]) -> None:
    """Print the sweeps of a comparison: mean over skills and retention with intervals, by the swept values."""
    from workbench.report.sweeps import grids, sentence

    for grid in grids(document.get("sweeps") or ()):
        if not grid.across:
            out.line(sentence(grid))
            continue
        for measure in grid.measures:
            head, rows = grid.table(measure)
            seeds = f", mean over {grid.seeds} seeds" if grid.seeds > 1 else ""
            out.heading(f"sweep {grid.name}: {measure['text']}{seeds}")
            out.table(head, rows, right=range(1, len(head)))
            baseline = measure["baseline"]
            if baseline is not None:
                out.say(f"{document['baseline']}: {grid.unit(measure).score(baseline)}")
        out.line("")
