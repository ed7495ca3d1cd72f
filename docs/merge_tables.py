"""Tables of docs/merging.md and docs/results.md about single merge methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import measured, of_results, table

CORE = "benchmarks/results/core-space.json"
WUDI = "benchmarks/results/wudi.json"


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


BLOCKS: dict[str, Callable[[Path], str]] = {"core": core_block, "wudi": wudi_block}
