"""Distributions of indicators, masked losses and CETT, each against a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worlds import mixtures
from worlds.planted import random_rows
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.activations.sites import Site, find_sites, visiting
from workbench.ground.errors import WorkbenchError
from workbench.neurons.masking import masked_losses, masking
from workbench.neurons.sparsity import TokenSample, distribution, token_sample, truncation_error


def activations_of(model: Any, sites: Any, row: ItemRow) -> list[Tensor]:
    """Per site [tokens, units], from the row alone."""
    found: dict[int, Tensor] = {}
    with visiting(model, sites, lambda n, a: found.update({n: a.reshape(-1, a.shape[-1]).clone()})), torch.no_grad():
        model(input_ids=torch.tensor([row.tokens]))
    return [found[n] for n in range(len(sites))]


def test_hand_made_distribution() -> None:
    """Two tokens, four neurons: by token maximum 1, .095, .045, 0 and .21, 1, .11, .41; columns of norm 1, 2, 1, 1."""
    module = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
    site = Site(5, "neurons", "out", module, 4)
    sample = TokenSample((site,), (torch.tensor([[2.0, -0.19, 0.09, 0.0], [-1.05, 5.0, 0.55, 2.05]]),), torch.zeros(2, 2), 9)
    found = distribution(sample, "activation")
    assert found.layers == [5]
    assert found.small == [4 / 8]
    assert [found.cdf[0][i] * 8 for i in (0, 5, 10, 20, 25, 40, 45, 99, 100)] == [1, 2, 3, 4, 5, 5, 6, 6, 8]
    magnitude = distribution(sample, "magnitude")  # 1, .19, .045, 0 and .105, 1, .055, .205
    assert magnitude.small == [5 / 8]
    assert magnitude.cdf[0][10] == 3 / 8
    assert (found.tokens, found.available, found.grid[20]) == (2, 9, 0.2)


def test_a_silent_token_is_zero() -> None:
    site = Site(0, "neurons", "out", nn.Linear(3, 3), 3)
    assert distribution(TokenSample((site,), (torch.zeros(1, 3),), torch.zeros(1, 2), 1), "activation").small == [1.0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_token_sample_is_of_single_rows(family: str, dense_of: Callable[[str], Path]) -> None:
    """Activations at drawn tokens, none of them first; the same tokens for another order of rows of equal lengths."""
    model, rows = live(dense_of(family)), random_rows([4, 12, 1, 7])
    sites = find_sites(model, 3, CPU)
    sample = token_sample(model, sites, rows, size=9, seed=4)
    assert (sample.tokens, sample.available) == (9, 3 + 11 + 1 + 6)
    assert all(t >= 1 or i == 2 for i, t in sample.places.tolist())
    for number in range(len(sites)):
        expected = torch.stack([activations_of(model, sites, rows[i])[number][t] for i, t in sample.places.tolist()])
        torch.testing.assert_close(sample.activations[number], expected, atol=1e-5, rtol=0)
    assert torch.equal(sample.places, token_sample(model, sites, rows, size=9, seed=4).places)
    assert not torch.equal(sample.places, token_sample(model, sites, rows, size=9, seed=5).places)
    assert token_sample(model, sites, rows, size=999).tokens == 21


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_nothing_masked_is_bit_for_bit_the_model(family: str, dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = live(mixtures.save_mixture(family, tmp_path / "m") if family == "mixtral" else dense_of(family))
    sites, rows = find_sites(model, 2 if family == "mixtral" else 3, CPU), random_rows([5, 14, 9])
    plain = losses(model, rows)
    found = masked_losses(model, sites, rows, percents=[0, 80])
    assert found.percents == (0, 80)
    assert all(torch.equal(sums[0], plain.sums) for sums in found.sums.values())
    assert not torch.equal(found.sums["activation"][1], plain.sums)
    assert masking(sites, "activation", 0)(0, torch.ones(2, sites[0].units)) is None
    tokens = torch.tensor([rows[1].tokens])
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with visiting(model, sites, lambda *_: None):
            assert torch.equal(model(input_ids=tokens).logits, before)


def test_everything_masked_is_the_model_without_feed_forward(dense_of: Callable[[str], Path]) -> None:
    model, rows = live(dense_of("llama")), random_rows([5, 14])
    found = masked_losses(model, find_sites(model, 3, CPU), rows, percents=[100])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    torch.testing.assert_close(found.sums["magnitude"][1], losses(model, rows).sums, atol=1e-5, rtol=0)


@pytest.mark.parametrize("indicator", ["activation", "magnitude"])
def test_the_lowest_are_masked(indicator: Any, dense_of: Callable[[str], Path]) -> None:
    """Per token: as many zeros as asked for, where the indicator is lowest; all others unchanged."""
    model = live(dense_of("llama"))
    sites = find_sites(model, 3, CPU)
    activations = torch.randn(2, 5, sites[1].units, generator=torch.Generator().manual_seed(0))
    masked = masking(sites, indicator, 37.5)(1, activations)
    assert masked is not None
    size = activations.abs() * (sites[1].norms() if indicator == "magnitude" else 1)
    off = masked == 0
    assert (off.sum(-1) == round(0.375 * 48)).all()
    assert (size.masked_fill(~off, 0).amax(-1) < size.masked_fill(off, 99).amin(-1)).all()
    assert torch.equal(masked[~off], activations[~off])


def test_padding_does_not_change_masked_losses(dense_of: Callable[[str], Path]) -> None:
    model, rows = live(dense_of("gpt2")), random_rows([3, 20, 11])
    sites = find_sites(model, 3, CPU)
    together = masked_losses(model, sites, rows, percents=[50])
    for i, row in enumerate(rows):
        single = masked_losses(model, sites, [row], percents=[50])
        for indicator, sums in together.sums.items():
            assert float((sums[:, i] - single.sums[indicator][:, 0]).abs().max()) / len(row.tokens) <= 1e-6


def test_impossible_shares() -> None:
    with pytest.raises(WorkbenchError, match="between 0 and 100 percent, found 120"):
        masked_losses(None, [], [], percents=[120])  # type: ignore[arg-type]


def direct_cett(activations: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> float:
    """The definition, token by token and neuron by neuron; weight is [hidden, units]."""
    total = 0.0
    for a in activations:
        outputs = a[None] * weight
        tail = outputs[:, outputs.norm(dim=0) < threshold].sum(1)
        total += float(tail.norm() / (outputs.sum(1) + (0 if bias is None else bias)).norm())
    return total / len(activations)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_cett_is_the_definition(family: str, dense_of: Callable[[str], Path]) -> None:
    model, rows = live(dense_of(family)), random_rows([20, 25, 30])
    sites = find_sites(model, 3, CPU)
    sample = token_sample(model, sites, rows, size=40)
    found = truncation_error(sample, 0.1)
    for number, site in enumerate(sites):
        weight = site.module.weight.detach()
        weight = weight.T if family == "gpt2" else weight
        bias = None if family == "llama" else site.module.bias.detach()
        threshold = float(found.thresholds[number])
        a = sample.activations[number]
        assert float(found.reached[number]) == pytest.approx(direct_cett(a, weight, bias, threshold), abs=1e-4)
        assert found.reached[number] <= 0.1
        size = a.abs() * weight.norm(dim=0)
        if (larger := size[size >= threshold]).numel():  # the bias can outweigh all neurons of a layer
            assert direct_cett(a, weight, bias, float(larger.min()) * 1.0001) > 0.1, "with one neuron more"
        below = (a.abs() * weight.norm(dim=0) < threshold).double().mean()
        assert float(found.sparsity[number]) == pytest.approx(float(below), abs=1e-3)
    assert all(a > b for a, b in zip(truncation_error(sample, 0.4).sparsity, found.sparsity, strict=True))
    assert found.mean_sparsity == pytest.approx(sum(found.sparsity) / 3)


def test_experts_have_no_cett(tmp_path: Path) -> None:
    model, rows = live(mixtures.save_mixture("qwen2_moe", tmp_path / "m")), random_rows([9, 12])
    sites = find_sites(model, 2, CPU)
    sample = token_sample(model, sites, rows, size=8)
    assert sample.activations[0].shape == (8, mixtures.EXPERTS)
    assert truncation_error(sample).layers == []
    assert truncation_error(sample).mean_sparsity is None
    found = distribution(sample, "activation")
    assert min(found.small) >= 4 / 6, "four of six experts are not selected"
