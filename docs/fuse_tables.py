"""The table of the page on fusing, from its results file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import measured, of_results, table

FUSE = "benchmarks/results/fuse.json"


@of_results(FUSE)
def fuse_block(found: dict[str, Any]) -> str:
    """Bits per byte of the base on held-out text, by what it was trained on, with gains over the base."""
    rows = []
    for row in found["rows"]:
        over = (
            f"{_percent(row['over_texts'])} [{_percent(row['over_low'])}, {_percent(row['over_high'])}]"
            if "over_texts" in row
            else ""
        )
        gain = f"{_percent(row['gain'])} [{_percent(row['low'])}, {_percent(row['high'])}]"
        rows.append([row["configuration"], f"{row['bits_per_byte']:.3f}", gain, over])
    aligned = next(row["fused"] for row in found["rows"] if row.get("fused"))
    note = (
        f"The starter base, trained for {found['steps']} steps on {found['texts']} texts of Python's reference with a learning rate of {found['rate']:g}; means of {found['seeds']} seeds. "
        f"The teacher is the same base with {found['tokens']:,} tokens of its own, trained for {found['teacher_steps']} steps on other pages; it has a distribution for "
        f"{100 * aligned['models']['teacher']['aligned']:.0f} % of the learned tokens. Scored on {found['scored']} texts of pages that neither has seen, {found['bytes'] / 1000:,.0f} kB. Gains are shares of the base's "
        "bits per byte, with 95 % intervals over the texts, paired. The paper's gains over its base, on BBH, are +5.16 % for fusing and +1.86 % for training on the texts alone. The ensemble "
        f"has the mean of both models' probabilities of each span between two shared ends of tokens. {measured(found)} The source: [{FUSE}](../{FUSE})."
    )
    return (
        table(["configuration", "bits per byte", "gain over the base", "more than the texts alone"], rows, left=1) + "\n\n" + note
    )


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %".replace("-", "−")


BLOCKS: dict[str, Callable[[Path], str]] = {"fuse": fuse_block}
