"""The table of docs/editing-streams.md: what a stream of updates keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import measured, of_results, table

STREAM = "benchmarks/results/edit-stream.json"


@of_results(STREAM)
def stream_block(found: dict[str, Any]) -> str:
    """Shares of facts that the model says after a number of rows, and perplexity; the cost of a row below."""
    start, *points = found["checkpoints"]
    lines = [
        [
            f"{p['rows']:,}",
            f"{p['facts']:,}",
            *(f"{100 * p[name]:.0f}" for name in ("latest", "all", "oldest")),
            f"{p['perplexity']:.2f}",
        ]
        for p in points
    ]
    windows, flat = found["windows"], found["flat"]
    costs = [row["both"] for row in windows]
    note = (
        f"`memit` on layer {found['layer']} of {_model(found['base'])}, {found['batch']} rows at a time; {found['updates']} of {found['rows']:,} rows update an earlier fact. Said: percent of facts with "
        f"all tokens of the current target the most likely ones. Perplexity is that of other text, {start['perplexity']:.2f} before the stream. A row takes {min(costs):.3f} to {max(costs):.3f} CPU s in windows "
        f"of {windows[0]['rows']} rows; the last window takes {flat['both']:.2f} times the first full one, its solve {flat['solve']:.2f} times. Peak memory grows from {windows[0]['peak'] / 1e6:.0f} to "
        f"{windows[-1]['peak'] / 1e6:.0f} MB. {measured(found)} The source: [{STREAM}](../{STREAM})."
    )
    heads = ["rows", "facts", "latest batch said", "all said", "ten oldest said", "perplexity"]
    return table(heads, lines, left=0) + "\n\n" + note


def _model(base: str) -> str:
    return "the starter base" if base == "starter" else "a fixture of 0.6 M parameters"


BLOCKS: dict[str, Callable[[Path], str]] = {"edit-stream": stream_block}
