"""The tables of docs/editing-streams.md and docs/forgetting.md: what updates and unlearning keep, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import interval, measured, of_results, table

STREAM = "benchmarks/results/edit-stream.json"
FORGETTING = "benchmarks/results/forgetting.json"


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


@of_results(FORGETTING)
def forgetting_block(found: dict[str, Any]) -> str:
    """Capitals unlearned at several strengths; the chosen weights of each kind marked."""
    tasks = list(found["rows"][0]["scores"])
    heads = [f"{task} (n = {found['rows'][0]['scores'][task]['n']})" for task in tasks]
    rows = []
    for row in found["rows"]:
        weights = [f"{row[brick]:+g}".replace("-", "−") if row[brick] else "" for brick in ("learned", "kept")]
        rows.append([*weights, *(interval(row["scores"][task]) for task in tasks), "chosen" if row.get("chosen") else ""])
    note = f"Scores in percent of items with 95 % intervals; the first row is the base. {measured(found)}"
    return table(["learned", "kept", *heads, ""], rows) + f"\n\n{note} The source: [{FORGETTING}](../{FORGETTING})."


BLOCKS: dict[str, Callable[[Path], str]] = {"edit-stream": stream_block, "forgetting": forgetting_block}
