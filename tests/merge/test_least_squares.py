"""The least-squares solver of RegMean and WUDI against hand-worked and numpy solutions, and the laws that follow from the formula."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worlds.merging import BASE, ONE, TWO, close, merge, models
from worlds.places import PROJECT

from workbench.errors import WorkbenchError
from workbench.merge.measuring.least_squares import solve
from workbench.merge.wudi import own_gram
from workbench.recipe.describe import describe
from workbench.recipe.methods import methods

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


def test_by_hand() -> None:
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


def test_what_no_brick_reads_gets_the_mean() -> None:
    grams = [torch.zeros(8, 8) for _ in range(3)]
    for i in range(3):
        grams[i][i, i] = 1.0  # brick i reads input i only; inputs 3.. are read by none
    result = solved(grams, 1e-8)
    for i in range(3):
        assert torch.allclose(result[:, i], THREE[i][:, i], atol=1e-5)
    assert torch.allclose(result[:, 3:], mean(THREE, WEIGHTS)[:, 3:], atol=1e-6)
    assert torch.allclose(solved([torch.zeros(8, 8)] * 3, 1e-8), mean(THREE, WEIGHTS), atol=1e-6)


def test_numpy_finds_the_same_minimum() -> None:
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


def test_linear_regression_tasks() -> None:
    """Three regressions on different inputs: the merged solution's loss is the pooled data's minimum, and below the average's."""
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


def test_a_singular_system_without_a_ridge_is_an_error() -> None:
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


def layer_model(tensor: Tensor) -> dict[str, Tensor]:
    return {"layers.0.w.weight": tensor, "layers.1.w.weight": torch.zeros(2, 2)}


def test_wudi_reaches_the_minimum() -> None:
    """Three rank-2 deltas with independent rows can all be kept: the loss is 0, which the mean and the sum do not reach."""
    deltas = [low_rank(seed) for seed in range(3)]
    base = torch.zeros(12, 10)
    bricks = {str(i): layer_model(d) for i, d in enumerate(deltas)}
    scale = sum(float(d.norm() ** 2) for d in deltas)
    for ridge, bound in ((1e-8, 1e-9), (1e-3, 1e-4)):
        result = merge("wudi", layer_model(base), bricks, ridge=ridge)["layers.0.w.weight"]
        assert objective(result, deltas) < bound * scale
    assert objective(mean(deltas, [1.0] * 3), deltas) > 1e-2 * scale
    assert objective(mean(deltas, [1 / 3] * 3), deltas) > 1e-2 * scale


def test_wudi_of_full_rank_deltas_is_the_stationary_point() -> None:
    result = solve(THREE, [lambda d=d: own_gram(d) for d in THREE], [1.0] * 3, 0.0)
    assert objective(result, THREE) < objective(mean(THREE, [1.0] * 3), THREE)
    for seed in range(5):
        step = 1e-2 * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        assert objective(result, THREE) <= objective(result + step, THREE)


def test_wudi_by_hand() -> None:
    """Deltas in different columns do not interfere and are added up; equal deltas are kept; opposite ones cancel."""
    one, two = torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [0.0, -1.0, 0.0]])

    def delta(*deltas: Tensor, **fields: Any) -> Tensor:
        bricks = {str(i): layer_model(BASE + d) for i, d in enumerate(deltas)}
        return merge("wudi", layer_model(BASE), bricks, **fields)["layers.0.w.weight"] - BASE

    assert torch.allclose(delta(one, two, ridge=1e-7), one + two, atol=1e-6)
    assert torch.allclose(delta(one, two, ridge=1e-7, **{"lambda": 0.5}), (one + two) / 2, atol=1e-6)
    assert torch.allclose(delta(ONE, ONE), ONE, atol=1e-6)
    # In float32 base − τ is not exactly the negative of base + τ: the default ridge keeps that rounding from being amplified.
    assert torch.allclose(delta(ONE, -ONE), torch.zeros(2, 3), atol=1e-3)
    # τ₁ = (1, 0), τ₂ = (a, 0) in one column: G = 1 for both whatever a is, so the mean; weights 3 and 1 weigh it.
    assert torch.allclose(delta(one, 3 * one), 2 * one, atol=1e-6)
    assert torch.allclose(delta(one, 3 * one, bricks={"0": 3, "1": 1}), 1.5 * one, atol=1e-6)


def test_wudi_solves_conv1d_by_its_inputs() -> None:
    """GPT-2 stores [in, out]: the merge of transposed weights is the transpose of the merge."""
    deltas = [low_rank(seed) for seed in range(2)]
    straight = merge("wudi", layer_model(torch.zeros(12, 10)), {str(i): layer_model(d) for i, d in enumerate(deltas)})
    stored = {str(i): layer_model(d.T.contiguous()) for i, d in enumerate(deltas)}
    turned = merge("wudi", layer_model(torch.zeros(10, 12)), stored, config={"num_hidden_layers": 2, "model_type": "gpt2"})
    assert torch.allclose(turned["layers.0.w.weight"].T, straight["layers.0.w.weight"], atol=1e-6)


def test_wudi_averages_what_is_not_a_linear_layer() -> None:
    base, bricks = models(3)
    result, averaged = merge("wudi", base, bricks), merge("average", base, bricks)
    close(result, averaged, base)  # none of these tensors is named ….weight


def test_wudi_is_the_same_in_any_order_and_drops_nothing_alone() -> None:
    deltas = {name: layer_model(low_rank(i)) for i, name in enumerate("abc")}
    base = layer_model(torch.ones(12, 10))
    bricks = {n: {k: base[k] + t[k] for k in base} for n, t in deltas.items()}
    results = [merge("wudi", base, {n: bricks[n] for n in order}) for order in permutations(bricks)]
    assert all(torch.equal(r["layers.0.w.weight"], results[0]["layers.0.w.weight"]) for r in results)
    close(merge("wudi", base, {"a": bricks["a"]}), bricks["a"], base)


@pytest.mark.parametrize("weights", [{"one": 0, "two": 0}, {"one": 1, "two": -0.5}])
def test_weights_of_squared_errors(weights: dict[str, float]) -> None:
    with pytest.raises((WorkbenchError, ValueError), match=r"squared errors|weights at"):
        merge("wudi", layer_model(BASE), {n: layer_model(BASE + ONE) for n in weights}, bricks=weights)


def test_wudi_says_that_its_result_is_longer_than_the_sum() -> None:
    """On deltas of low rank with little in common: longer than their sum, as the method's page and its measured table say."""
    base = layer_model(torch.zeros(40, 48))
    bricks = {n: layer_model(low_rank(i, 2, 40, 48)) for i, n in enumerate("abc")}
    total = sum(t["layers.0.w.weight"] for t in bricks.values())
    merged = merge("wudi", base, bricks)["layers.0.w.weight"]
    assert merged.norm() / total.norm() > 1.02
    assert "can be longer than the sum of the deltas" in describe(methods()["merge:wudi"])["text"]
    measured = json.loads((PROJECT / "benchmarks/results/wudi.json").read_text("utf-8"))
    assert measured["length_ratio"]["mean"] > 1.5
    assert measured["cosine"]["mean"] < 0.7
