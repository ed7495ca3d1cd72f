"""The least-squares solver of RegMean and WUDI against hand-worked and numpy solutions, and the laws that follow from the formula."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worlds.factored import adapters, flat_copy, relative, step_on
from worlds.factored import delta as delta_of
from worlds.merging import BASE, ONE, TWO, close, merge
from worlds.places import PROJECT
from worlds.project import CPU

from workbench.errors import WorkbenchError
from workbench.merge.measuring.calibration import solve
from workbench.merge.measuring.layers import Grams
from workbench.weights.specs import load

THREE = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
WEIGHTS = [1.0, 2.0, 0.5]


def gram(seed: int, size: int = 8, rows: int = 40) -> Tensor:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(100 + seed)) * torch.linspace(0.1, 3, size)
    return x.T @ x / rows


def solved(grams: list[Tensor], ridge: float = 1e-9, weights: list[float] = WEIGHTS, deltas: list[Tensor] = THREE) -> Tensor:
    return solve(deltas, [lambda g=g: g for g in grams], weights, ridge)


def mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1.0])
def test_equal_grams_give_the_mean_for_any_ridge(ridge: float) -> None:
    assert torch.allclose(solved([gram(0)] * 3, ridge), mean(THREE, WEIGHTS), rtol=0, atol=2e-6)
    assert torch.allclose(solved([torch.eye(8)] * 3, ridge), mean(THREE, WEIGHTS), rtol=0, atol=5e-7)


def test_least_squares_by_hand_and_without_inputs() -> None:
    """Diagonal Grams weigh column by column: G₁ = diag(1, 3, 0), G₂ = diag(1, 1, 4); then one pair of inputs that go together."""
    grams = [torch.diag(torch.tensor([1.0, 3.0, 0.0])), torch.diag(torch.tensor([1.0, 1.0, 4.0]))]
    expected = torch.stack([(ONE + TWO)[:, 0] / 2, (3 * ONE + TWO)[:, 1] / 4, TWO[:, 2]], 1)
    assert torch.allclose(solved(grams, 0.0, [1.0, 1.0], [ONE, TWO]), expected, atol=1e-6)
    # Weights 2 and 1: (2·3·τ₁ + 1·τ₂) / 7 in the second column.
    weighted = solved(grams, 0.0, [2.0, 1.0], [ONE, TWO])
    assert torch.allclose(weighted[:, 1], (6 * ONE + TWO)[:, 1] / 7, atol=1e-6)
    # G₁ = I, G₂ = [[2,1],[1,2]]: (τ₁ + τ₂G₂)(I + G₂)⁻¹ with (I + G₂)⁻¹ = [[3,−1],[−1,3]]/8; τ₁ = (1, 0), τ₂ = (0, 1)
    two = [
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0, 1.0]]),
    ]  # right side (1, 0) + (1, 2) = (2, 2); times the inverse: (½, ½)
    assert torch.allclose(
        solved([torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])], 0.0, [1.0, 1.0], two), torch.tensor([[0.5, 0.5]])
    )
    grams = [torch.zeros(8, 8) for _ in range(3)]
    for i in range(3):
        grams[i][i, i] = 1.0  # brick i reads input i only; inputs 3.. are read by none
    result = solved(grams, 1e-8)
    for i in range(3):
        assert torch.allclose(result[:, i], THREE[i][:, i], atol=1e-5)
    assert torch.allclose(result[:, 3:], mean(THREE, WEIGHTS)[:, 3:], atol=1e-6)
    assert torch.allclose(solved([torch.zeros(8, 8)] * 3, 1e-8), mean(THREE, WEIGHTS), atol=1e-6)


def test_numpy_and_regression_find_the_same_minimum() -> None:
    """min over Δ of Σ wᵢ‖(Δ − τᵢ)Xᵢᵀ‖², stacked and given to numpy's least squares; and no gradient is left there."""
    xs = [torch.randn(12, 8, generator=torch.Generator().manual_seed(i)).double().numpy() for i in range(3)]
    rows = np.concatenate([np.sqrt(w) * x for w, x in zip(WEIGHTS, xs, strict=True)])
    targets = np.concatenate([np.sqrt(w) * x @ t.double().numpy().T for w, x, t in zip(WEIGHTS, xs, THREE, strict=True)])
    expected, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    grams = [torch.from_numpy(x.T @ x).float() for x in xs]
    result = solved(grams, 0.0)
    assert np.abs(result.numpy() - expected.T).max() < 1e-5
    delta = result.double().requires_grad_()
    loss = sum(
        w * torch.einsum("oi,ij,oj->", delta - t, g.double(), delta - t) for w, t, g in zip(WEIGHTS, THREE, grams, strict=True)
    )
    (gradient,) = torch.autograd.grad(loss, delta)
    assert float(gradient.abs().max()) < 1e-4 * loss.item()
    # Three regressions on different inputs: the merged solution's loss is the pooled data's minimum, and below the average's.
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for scale in (1.0, 2.0, 3.0):
        x = torch.randn(60, 8, generator=generator) * (torch.rand(8, generator=generator) * scale)
        y = x @ torch.randn(8, 2, generator=generator) + 0.1 * torch.randn(60, 2, generator=generator)
        tasks.append((x, y, torch.linalg.lstsq(x, y).solution.T))
    deltas = [w for *_, w in tasks]
    result = solved([x.T @ x for x, *_ in tasks], 1e-9, [1.0] * 3, deltas)

    def loss(w: Tensor) -> float:
        return sum(float((x @ w.T - y).square().sum()) for x, y, _ in tasks)

    pooled = torch.linalg.lstsq(torch.cat([x for x, *_ in tasks]), torch.cat([y for _, y, _ in tasks])).solution.T
    assert loss(result) == pytest.approx(loss(pooled), rel=1e-5)
    assert loss(result) < 0.9 * loss(mean(deltas, [1.0] * 3))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    with pytest.raises(WorkbenchError, match="singular at ridge 0") as caught:
        solved([x.T @ x] * 3, 0.0)
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


def test_wudi_is_the_formula_and_lowers_interference() -> None:
    """SWUDI with the participation count, term by term, on full-rank and on low-rank deltas, with weights and lambda."""
    for deltas in (THREE, [low_rank(seed) for seed in range(3)]):
        bricks = {str(i): layer_model(d) for i, d in enumerate(deltas)}
        weights = {"0": 1.0, "1": -2.0, "2": 0.5}
        found = merge("wudi", layer_model(torch.zeros_like(deltas[0])), bricks, bricks=weights, **{"lambda": 0.7})[
            "layers.0.w.weight"
        ]
        scaled = [w * d.double().numpy() for w, d in zip(weights.values(), deltas, strict=True)]
        total = sum(scaled)
        gram = sum(v.T @ v / (v**2).sum() for v in scaled)
        right = sum(v @ v.T @ v / (v**2).sum() for v in scaled)
        values, vectors = np.linalg.eigh(gram)
        values = values.clip(0)
        count = round(np.sqrt(values).sum() ** 2 / values.sum())
        top = vectors[:, np.argsort(-values)[:count]]
        expected = 0.7 * (total + (right @ np.linalg.pinv(gram, rcond=1e-10) - total) @ top @ top.T)
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    deltas = [low_rank(seed) for seed in range(3)]
    result = merge("wudi", layer_model(torch.zeros(12, 10)), {str(i): layer_model(d) for i, d in enumerate(deltas)})
    assert objective(result["layers.0.w.weight"], deltas) < 0.5 * objective(mean(deltas, [1 / 3] * 3), deltas)


def test_wudi_by_hand_and_of_conv1d() -> None:
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
    # GPT-2 stores [in, out]: the merge of transposed weights is the transpose of the merge.
    deltas = [low_rank(seed) for seed in range(2)]
    straight = merge("wudi", layer_model(torch.zeros(12, 10)), {str(i): layer_model(d) for i, d in enumerate(deltas)})
    stored = {str(i): layer_model(d.T.contiguous(), "c_fc") for i, d in enumerate(deltas)}
    config = {"num_hidden_layers": 2, "model_type": "gpt2"}
    turned = merge("wudi", layer_model(torch.zeros(10, 12), "c_fc"), stored, config=config)
    assert torch.allclose(turned["layers.0.c_fc.weight"].T, straight["layers.0.w.weight"], atol=1e-6)


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
