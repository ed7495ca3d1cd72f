"""Tables of docs/merging.md and docs/results.md about single merge methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import measured, of_results, table

CORE = "benchmarks/results/core-space.json"
WUDI = "benchmarks/results/wudi.json"
MISSING_ROWS = "benchmarks/results/missing-rows.json"


@of_results(MISSING_ROWS)
def missing_rows_block(found: dict[str, Any]) -> str:
    """Bits per byte of a model with another one's tokenizer, by how the rows of missing tokens are made."""
    rows = []
    for row in found["rows"]:
        left = [f"{value:.2f}" for value in (row.get("residual") or {}).values()]
        rows.append([row["rows"], f"{row['bits_per_byte']:.2f}", f"{row['tokens_scored']:,}", ", ".join(left)])
    lacking, shared = next((row["lacking"], row["shared"]) for row in found["rows"] if "shared" in row)
    note = (
        f"The starter base with the tokenizer of a donor: the base with {found['tokens']:,} tokens of its own, trained on pages of Python's reference, "
        f"whose rows were trained for {found['steps']} steps. The base lacks {lacking:,} of these tokens and shares {shared:,}. Scored on {found['pages']} other "
        f"pages, {found['bytes'] / 1000:,.0f} kB. Unexplained: mean share of a donor's row that its combination leaves. {measured(found)} The source: "
        f"[{MISSING_ROWS}](../{MISSING_ROWS})."
    )
    return table(["rows of missing tokens", "bits per byte", "tokens", "unexplained"], rows, left=1) + "\n\n" + note


@of_results(CORE)
def core_block(found: dict[str, Any]) -> str:
    """Spectral merges of adapters on one layer: from their factors, and from whole deltas."""
    rows = [
        [
            f"`{r['method']}`",
            f"{r['factors_seconds']:.2f}",
            f"{r['whole_seconds']:.1f}",
            f"{r['ratio']}",
            f"{r['relative_difference']:.1e}",
        ]
        for r in found["rows"]
    ]
    heads = ["merge", "from factors, CPU s", "whole deltas, CPU s", "ratio", "relative difference"]
    note = (
        f"{found['adapters']} random adapters of rank {found['rank']} on a {found['size']} x {found['size']} layer, float32, "
        f"{found['threads']} thread; the bases that they share and their core matrices take {found['basis_seconds']:.2f} s of the first "
        f"column. {measured(found)} The source: [{CORE}](../{CORE})."
    )
    return table(heads, rows, left=1) + "\n\n" + note


@of_results(WUDI)
def wudi_block(found: dict[str, Any]) -> str:
    """The merged delta of `wudi` beside the sum of the bricks' deltas: length, direction, projections on the bricks."""
    names = {
        "length_ratio": "length, over that of the sum",
        "cosine": "cosine with the sum",
        "least_projection": "smallest projection on a brick's delta, over that delta's squared length",
    }
    rows = [
        [text, *(f"{found[key][part]:.2f}".replace("-", "−") for part in ("mean", "low", "high"))] for key, text in names.items()
    ]
    bricks = ", ".join(f"`{name}`" for name in found["bricks"])
    note = (
        f"Bricks {bricks} of [`{found['recipe']}`](../{found['recipe']}), all weights 1, ridge {found['ridge']:g}, {found['layers']} linear layers; "
        f"Frobenius norms, one number a layer. {measured(found)} The source: [{WUDI}](../{WUDI})."
    )
    return table([f"merged delta, over {found['layers']} layers", "mean", "lowest", "highest"], rows, left=1) + "\n\n" + note


BLOCKS: dict[str, Callable[[Path], str]] = {
    "core": core_block,
    "missing_rows": missing_rows_block,
    "wudi": wudi_block,
}
