"""The tables of docs/memories.md: facts that come, change and go, and how soon feedback makes the right one of contradicting statements lead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import interval, measured, of_results, table

CREDIBILITY = "benchmarks/results/credibility.json"
STATEMENTS = 5
UPDATES = "benchmarks/results/memory-updates.json"


@of_results(UPDATES)
def updates_block(found: dict[str, Any]) -> str:
    """Write how a model answers after facts of its memory are created, updated and deleted."""
    changes = ("before", "create", "update", "delete")
    lines = [
        [f"`{row['method']}`", answer, *(interval(row[answer][change]["exact"]) for change in changes)]
        for row in found["rows"]
        for answer in ("new answer", "true answer")
    ]
    restored = " and ".join(
        f"{row['restored']['texts']} texts and {row['restored']['logits']} vectors of logits of `{row['method']}`"
        for row in found["rows"]
    )
    note = (
        f"{found['facts']} CounterFact facts in a memory that also has {found['others']} others, on the starter base. Percent of greedy texts that are the answer, up to a full stop or line break, with 95 % intervals. "
        f"A fact is created with a new answer and updated to the true one. After all are deleted, {restored} (of {found['facts']} each) are bit for bit those from before. {measured(found)} "
        f"The source: [{UPDATES}](../{UPDATES})."
    )
    return table(["method", "said", "before", "created", "updated", "deleted"], lines, left=2) + "\n\n" + note


@of_results(CREDIBILITY)
def credibility_block(found: dict[str, Any]) -> str:
    """Share of runs in which the right one of contradicting statements leads, by rounds of feedback."""
    rounds = list(found["rows"][0]["led"])
    lines = [
        [row["way"], *(f"{100 * row['led'][n] / found['runs']:.0f}" for n in rounds)]
        for row in found["rows"]
        if row["statements"] == STATEMENTS
    ]
    note = (
        f"Percent of {found['runs']} simulated runs in which the right one of {STATEMENTS} statements leads alone, after so many rounds of feedback for each; {100 * found['wrong']:.0f} % of the "
        "feedback is wrong. In a round, the leading statement is used. `best possible` knows the rate of wrong feedback and that one statement is right. "
        f"{measured(found)} The source: [{CREDIBILITY}](../{CREDIBILITY})."
    )
    heads = ["way", *(f"{n} round{'s' * (n != '1')} each" for n in rounds)]
    return table(heads, lines, left=1) + "\n\n" + note


BLOCKS: dict[str, Callable[[Path], str]] = {"credibility": credibility_block, "memory-updates": updates_block}
