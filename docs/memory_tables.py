"""The table of docs/memories.md: how soon feedback makes the right one of contradicting statements lead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import measured, of_results, table

CREDIBILITY = "benchmarks/results/credibility.json"


@of_results(CREDIBILITY)
def credibility_block(found: dict[str, Any]) -> str:
    """Share of runs in which the right one of contradicting statements leads, by rounds of feedback."""
    rounds = list(found["rows"][0]["led"])
    lines = [
        [str(row["statements"]), row["way"], *(f"{100 * row['led'][n] / found['runs']:.0f}" for n in rounds)]
        for row in found["rows"]
    ]
    note = (
        f"Percent of {found['runs']} simulated runs in which the right statement leads alone, after so many rounds of feedback for each statement; {100 * found['wrong']:.0f} % of the "
        "feedback is wrong. In a round, the leading statement is used. `best possible` knows the rate of wrong feedback and that one statement is right. "
        f"{measured(found)} The source: [{CREDIBILITY}](../{CREDIBILITY})."
    )
    heads = ["statements", "way", *(f"{n} round{'s' * (n != '1')} each" for n in rounds)]
    return table(heads, lines, left=2) + "\n\n" + note


BLOCKS: dict[str, Callable[[Path], str]] = {"credibility": credibility_block}
