"""Metrics of decompositions: on the paper's own tables, on matrices made by hand, and on models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.tiny import live

from workbench.activations.sites import sample_places
from workbench.neurons.bricks import function_cosines, layer_updates, quality_curve
from workbench.neurons.damage import coupling, dominant_rows, row_couplings

LLAMA = torch.tensor([
    [112, 6, 8, 7, 8, 4, 8], [10, 210, 21, 14, 10, 15, 24], [67, 296, 122, 81, 79, 184, 86], [16, 8, 7, 59, 7, 26, 10],
    [15, 3, 9, 10, 147, 9, 7], [13, 10, 12, 26, 5, 444, 11], [5, 8, 11, 7, 5, 9, 32],
]).double()  # fmt: skip
MISTRAL = torch.tensor([
    [118, 0, 6, 10, 7, 9, 7], [5, 1774, 14, 13, 4, 10, 14], [11, 105, 375, 19, 9, 23, 17], [11, 3, 8, 115, 8, 31, 9],
    [19, 4, 12, 17, 200, 14, 6], [377, 391, 477, 381, 241, 9243, 440], [3, 16, 10, 4, 3, 9, 41],
]).double()  # fmt: skip


def test_published_matrices() -> None:
    """Xiao et al. 2024, figure 9: coupling .075 and .060; the diagonal is largest in 6 and in 7 of 7 rows, in 4 and 2 columns."""
    assert coupling(torch.stack([LLAMA, MISTRAL])).tolist() == pytest.approx([0.075, 0.060], abs=5e-4)
    assert dominant_rows(LLAMA).tolist() == [True, True, False, True, True, True, True]
    assert dominant_rows(MISTRAL).all()
    assert [int(dominant_rows(m.T).sum()) for m in (LLAMA, MISTRAL)] == [4, 2]


def test_ends_of_the_scale() -> None:
    assert float(coupling(torch.diag(torch.tensor([1.0, 5.0, 2.0])))) == 0
    assert float(coupling(torch.full((4, 4), 3.0))) == 1
    broken = torch.tensor([[0.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 2.0]])
    assert row_couplings(broken).tolist() == [torch.inf, 0.25, 0.5]
    assert float(coupling(broken)) == 0.5
    assert float(coupling(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))) == pytest.approx((0.5 + 3) / 2), "of two rows, the mean"
    with pytest.raises(ValueError, match="square damage matrices"):
        coupling(torch.ones(2, 3))


def test_ties_do_not_dominate() -> None:
    assert dominant_rows(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [False, True]


def test_quality_curve() -> None:
    shares, scores = (0.0, 0.25, 0.5, 0.75, 1.0), (0.1, 0.84, 0.6, 0.85, 0.9)
    curve = quality_curve(shares, scores, 0.1)
    assert curve is not None
    assert curve.quality == pytest.approx((0, 0.925, 0.625, 0.9375, 1))
    assert curve.area == pytest.approx(0.25 * (0.4625 + 0.775 + 0.78125 + 0.96875))
    assert curve.least_share == 0.75, "a quarter keeps it by luck: a half does not"
    assert [c.least_share for kept in (0.5, 1.0) if (c := quality_curve(shares, scores, 0.1, kept))] == [0.25, 1.0]
    half = quality_curve((0.5, 1.0), (1.0, 1.0), 0.0)
    assert half is not None
    assert half.area == pytest.approx(0.25 + 0.5), "nothing is kept by no bricks"
    assert "order" not in half.to_dict()
    assert quality_curve((0.5, 1.0), (1.0, 0.0), 0.0) is None, "no better than without bricks"


@pytest.mark.parametrize(("shares", "scores"), [((0.5, 0.2, 1.0), (1, 1, 1)), ((0.5,), (1,))])
def test_bad_curves(shares: tuple[float, ...], scores: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        quality_curve(shares, scores, 0.0)


def test_sampled_places() -> None:
    places = sample_places([3, 1, 5], 4, seed=2)
    assert places.shape == (4, 2)
    assert all(t >= 1 or i == 1 for i, t in places.tolist())
    assert sample_places([3, 1, 5], 99).tolist() == [[0, 1], [0, 2], [1, 0], [2, 1], [2, 2], [2, 3], [2, 4]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_updates_are_those_of_single_rows(family: str, model_of: Callable[..., Path]) -> None:
    model = live(model_of(family, torch.float32))
    rows = [[5, 9, 12, 30, 7], [4, 8, 15], [16, 23, 42, 8, 9, 10, 11]]
    places = sample_places([5, 3, 7], 8)
    found = layer_updates(model, 4, rows, places)
    for n, (i, t) in enumerate(places.tolist()):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([rows[i]]), output_hidden_states=True).hidden_states
        for layer in range(3):  # the last of transformers' states has passed the final norm
            expected = states[layer + 1][0, t] - states[layer][0, t]
            torch.testing.assert_close(found[layer, n], expected, atol=2e-5, rtol=0)


def test_cosines_of_bricks(model_of: Callable[..., Path]) -> None:
    """The same change twice has cosine 1, its opposite nearly −1 where it is small, and unrelated ones are near 0."""
    base = model_of("llama", torch.float32)
    rows = [torch.randint(2, 60, (20,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]
    places = sample_places([20] * 6, 60)

    def outputs(scale: float, seed: int) -> torch.Tensor:
        model = live(base)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.model.layers:
                weight = layer.mlp.down_proj.weight
                weight.add_(scale * torch.randn(weight.shape, generator=draw))
        return layer_updates(model, 4, rows, places)

    plain = layer_updates(live(base), 4, rows, places)
    bricks = {"one": outputs(1e-3, 1), "again": outputs(1e-3, 1), "against": outputs(-1e-3, 1), "other": outputs(1e-3, 2)}
    found = function_cosines(plain, bricks)
    mean = torch.tensor(found.mean)
    assert float(mean[0, 1]) == pytest.approx(1, abs=1e-3)
    assert float(mean[0, 2]) < -0.95
    assert abs(float(mean[0, 3])) < 0.3
    assert found.tokens == 60
    assert torch.equal(mean, mean.T)
    assert function_cosines(plain, {"one": bricks["one"], "none": plain}).mean[0][1] is None
