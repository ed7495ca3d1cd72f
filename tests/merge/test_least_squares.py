"""The least-squares solver of RegMean and WUDI against hand-worked and numpy solutions, and the laws that follow from the formula."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.factored import adapters, flat_copy, relative, step_on
from worlds.factored import delta as delta_of
from worlds.merging import BASE, ONE, close, merge
from worlds.places import PROJECT
from worlds.project import CPU

from workbench.ground.errors import WorkbenchError
from workbench.merge.measuring.calibration import solve
from workbench.merge.measuring.layers import Grams
from workbench.weights.specs import load


def mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)


def test_the_merge_of_regressions_is_the_regression_on_all_data() -> None:
    """Three regressions on different inputs: the merged solution's loss is the pooled data's minimum, and below the average's."""
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for scale in (1.0, 2.0, 3.0):
        x = torch.randn(60, 8, generator=generator) * (torch.rand(8, generator=generator) * scale)
        y = x @ torch.randn(8, 2, generator=generator) + 0.1 * torch.randn(60, 2, generator=generator)
        tasks.append((x, y, torch.linalg.lstsq(x, y).solution.T))
    deltas = [w for *_, w in tasks]
    result = solve(deltas, [lambda x=x: x.T @ x for x, *_ in tasks], [1.0] * 3, 1e-9)

    def loss(w: Tensor) -> float:
        return sum(float((x @ w.T - y).square().sum()) for x, y, _ in tasks)

    pooled = torch.linalg.lstsq(torch.cat([x for x, *_ in tasks]), torch.cat([y for _, y, _ in tasks])).solution.T
    assert loss(result) == pytest.approx(loss(pooled), rel=1e-5)
    assert loss(result) < 0.9 * loss(mean(deltas, [1.0] * 3))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    with pytest.raises(WorkbenchError, match="singular at ridge 0") as caught:
        solve(deltas, [lambda: x.T @ x] * 3, [1.0] * 3, 0.0)
    assert caught.value.hint == "Raise `ridge`."


# -- WUDI


def objective(delta: Tensor, deltas: list[Tensor]) -> float:
    """Σ ‖(Δ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖², the paper's loss of one layer."""
    return sum(float(((delta - t).double() @ t.double().T).square().sum() / t.double().square().sum()) for t in deltas)


def low_rank(seed: int, rank: int = 2, out: int = 12, inputs: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)


def layer_model(tensor: Tensor, name: str = "w") -> dict[str, Tensor]:
    return {f"layers.0.{name}.weight": tensor, f"layers.1.{name}.weight": torch.zeros(2, 2)}


def test_wudi_lowers_interference() -> None:
    deltas = [low_rank(seed) for seed in range(3)]
    result = merge("wudi", layer_model(torch.zeros(12, 10)), {str(i): layer_model(d) for i, d in enumerate(deltas)})
    assert objective(result["layers.0.w.weight"], deltas) < 0.5 * objective(mean(deltas, [1 / 3] * 3), deltas)


def test_wudi_by_hand() -> None:
    """Deltas in different columns do not interfere and are added up; equal deltas are kept once; opposite ones cancel."""
    one, two = torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [0.0, -1.0, 0.0]])

    def delta(*deltas: Tensor, **fields: Any) -> Tensor:
        bricks = {str(i): layer_model(BASE + d) for i, d in enumerate(deltas)}
        return merge("wudi", layer_model(BASE), bricks, **fields)["layers.0.w.weight"] - BASE

    assert torch.allclose(delta(one, two), one + two, atol=1e-6)
    assert torch.allclose(delta(one, two, **{"lambda": 0.5}), (one + two) / 2, atol=1e-6)
    # One input direction, which is kept: τ₁ = (1, 0), τ₂ = (3, 0) have C = 2 and D = 4, so Δ = 2; weights scale the deltas: 3·1 and 1·3.
    assert torch.allclose(delta(one, 3 * one), 2 * one, atol=1e-6)
    assert torch.allclose(delta(one, 3 * one, bricks={"0": 3, "1": 1}), 3 * one, atol=1e-6)
    assert torch.allclose(delta(one, -one), torch.zeros(2, 3), atol=1e-6)


def test_wudi_does_not_depend_on_order_or_factors() -> None:
    deltas = {name: layer_model(low_rank(i)) for i, name in enumerate("abc")}
    base = layer_model(torch.ones(12, 10))
    bricks = {n: {k: base[k] + t[k] for k in base} for n, t in deltas.items()}
    results = [merge("wudi", base, {n: bricks[n] for n in order}) for order in permutations(bricks)]
    assert all(torch.equal(r["layers.0.w.weight"], results[0]["layers.0.w.weight"]) for r in results)
    close(merge("wudi", base, {"a": bricks["a"]}), bricks["a"], base)
    # Adapters are merged in their common space, which gives the numbers of whole deltas.
    bricks = adapters((2, 3, 4), names=("w",))
    found = load(step_on("wudi", {"w": torch.zeros(24, 18)}, bricks), "w", torch.float32, CPU)
    assert relative(found, delta_of("wudi", flat_copy(bricks)).double().numpy()) < 1e-5


@pytest.mark.parametrize("weights", [{"one": 0, "two": 0}, {"one": 1, "two": -0.5}])
def test_weights_of_squared_errors(weights: dict[str, float]) -> None:
    with pytest.raises((WorkbenchError, ValueError), match=r"squared errors|weights at"):
        merge(
            "regmean",
            layer_model(BASE),
            {n: layer_model(BASE + ONE) for n in weights},
            measured={n: Grams(Path(), {}, {}) for n in weights},
            bricks=weights,
            calibration="texts.jsonl",
        )


def test_wudi_is_near_the_sum_on_the_starter_bricks() -> None:
    """The measured table: about as long as the sum, and in its direction, where the full solution was 1.7 times as long."""
    measured = json.loads((PROJECT / "benchmarks/results/wudi.json").read_text("utf-8"))
    assert 0.9 < measured["length_ratio"]["mean"] < 1.2
    assert measured["cosine"]["mean"] > 0.8
