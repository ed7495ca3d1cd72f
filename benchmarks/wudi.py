"""Compare what `merge: wudi` makes of the starter bricks with the plain sum of the same deltas, layer by layer.

    python benchmarks/wudi.py

Reads the three bricks of recipes/starter-wudi.yaml on the starter base. For every linear layer that `wudi` solves, the script
records the length (Frobenius norm) of the merged delta over the length of the sum of the bricks' deltas, and the cosine of the
two. It also records the smallest projection of the merged delta on a brick's delta: <merged, delta> / <delta, delta>, which is 1
where the merge holds all of the brick's delta. The numbers describe weights, not scores. Results go to
benchmarks/results/wudi.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import write_results
from torch import Tensor

from workbench.merge.measuring.calibration import is_linear
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.weights.specs import load

PROJECT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/starter-wudi.yaml"
OUT = PROJECT / "benchmarks" / "results" / "wudi.json"
CPU = torch.device("cpu")


def main() -> None:
    """Merge with `wudi`, compose each brick alone, and compare tensor by tensor."""
    torch.set_num_threads(1)
    plain = resolve(load_recipe(PROJECT / RECIPE))
    bricks = list(plain.bricks)
    merged, alone = compose(plain, CPU).model, [_alone(brick) for brick in bricks]
    rows = []
    for name in plain.base.weights.specs:
        if not is_linear(plain.base, name):
            continue
        base = load(plain.base.weights, name, torch.float32, CPU).double()
        deltas = [load(model.weights, name, torch.float32, CPU).double() - base for model in alone]
        if sum(bool(delta.any()) for delta in deltas) > 1:
            rows.append(compared(load(merged.weights, name, torch.float32, CPU).double() - base, deltas))
    document = {
        "recipe": RECIPE,
        "bricks": bricks,
        "layers": len(rows),
        "torch": torch.__version__,
    }
    write_results(OUT, {**document, **{key: summary([row[key] for row in rows]) for key in rows[0]}})


def _alone(brick: str) -> Any:
    """Return the base plus one brick."""
    text = f"version: 1\nbase: bricks/starter/base\nbricks: {{{brick}: bricks/{brick}}}\nsteps: [{{merge: task_arithmetic}}]\n"
    file = PROJECT / "recipes" / f".wudi-{brick}.yaml"
    file.write_text(text, "utf-8")
    try:
        return compose(resolve(load_recipe(file)), CPU).model
    finally:
        file.unlink()


def compared(merged: Tensor, deltas: Sequence[Tensor]) -> dict[str, float]:
    """Return length and cosine of a merged delta relative to the bricks' sum, and its smallest projection on one brick's delta."""
    total = torch.stack(list(deltas)).sum(0)
    inner = float((merged * total).sum())
    shares = [float((merged * delta).sum() / delta.square().sum()) for delta in deltas if delta.any()]
    return {
        "length_ratio": float(merged.norm() / total.norm()),
        "cosine": inner / float(merged.norm() * total.norm()),
        "least_projection": min(shares),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over the layers, the lowest and the highest value."""
    return {"mean": round(statistics.fmean(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


if __name__ == "__main__":
    main()
