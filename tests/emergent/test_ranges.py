"""Neurons that are switched off only within a range of their activation, against hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.planted import CLASSES, CONTINUATIONS, MARKERS, NEURONS, VOCABULARY, planted_items, planted_llama
from worlds.project import CPU
from worlds.tiny import live

from workbench.emergent.labelled import ItemRow
from workbench.emergent.losses import losses
from workbench.emergent.ranges import ablate_between, activation_moments, switching_off_between
from workbench.emergent.sets import NeuronSet
from workbench.emergent.sites import find_sites, switching_off
from workbench.errors import WorkbenchError


def rows_of(count: int, seed: int = 0) -> list[ItemRow]:
    draw = torch.Generator().manual_seed(seed)
    return [ItemRow(torch.randint(2, 60, (5 + i % 4,), generator=draw).tolist(), 4 + i % 3) for i in range(count)]


def activations_by_hand(model: Any, name: str, rows: list[ItemRow]) -> list[torch.Tensor]:
    """The inputs of an output projection on the prompt of each row, one row at a time."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.tokens[: row.prompt]]))
    hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_moments(family: str, dense_of: Callable[[str], Path]) -> None:
    """Signed means and population standard deviations of each function's tokens, without the first one, whatever the batches."""
    model, rows = live(dense_of(family)), rows_of(9)
    functions = [i % 2 for i in range(9)]
    sites = find_sites(model, 3, CPU)
    found = activation_moments(model, sites, rows, functions)
    for site in sites:
        seen = activations_by_hand(model, site.name, rows)
        for function in (0, 1):
            values = torch.cat([s[1:] for s, f in zip(seen, functions, strict=True) if f == function]).double()
            torch.testing.assert_close(found.mean[site.layer][function], values.mean(0), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(found.std[site.layer][function], values.std(0, correction=0), atol=1e-6, rtol=1e-3)


def test_bounds_belong_to_the_set_s_neurons(dense_of: Callable[[str], Path]) -> None:
    model = live(dense_of("llama"))
    sites = find_sites(model, 3, CPU)
    found = activation_moments(model, sites, rows_of(6), [0, 1, 1, 0, 1, 0])
    units = {site.layer: site.units for site in sites}
    low, high = found.bounds(NeuronSet("f", "neurons", units, {1: torch.tensor([2, 9])}), 1, (-0.5, 2.0))[1]
    mean, std = found.mean[1][1], found.std[1][1]
    assert low.tolist() == pytest.approx([float(mean[i] - 0.5 * std[i]) for i in (2, 9)])
    assert high.tolist() == pytest.approx([float(mean[i] + 2 * std[i]) for i in (2, 9)])


def test_the_widest_range_switches_off_and_an_empty_one_changes_nothing(dense_of: Callable[[str], Path]) -> None:
    """Bit for bit, and a range between acts as a hook written by hand does."""
    model, rows = live(dense_of("llama")), rows_of(6)
    sites = find_sites(model, 3, CPU)
    index = torch.tensor([1, 4, 30])
    neurons = NeuronSet("f", "neurons", {site.layer: site.units for site in sites}, {1: index})
    wide, empty = (torch.full((3,), sign * torch.inf) for sign in (1, -1))
    result = ablate_between(model, sites, rows, [neurons], [{1: (-wide, wide)}])
    with switching_off(model, sites, {1: index}):
        assert torch.equal(result.sums[0], losses(model, rows).sums)
    assert torch.equal(result.base.sums, losses(model, rows).sums)
    nothing = ablate_between(model, sites, rows, [neurons], [{1: (wide, empty)}])
    assert torch.equal(nothing.sums[0], nothing.base.sums)
    low, high = torch.tensor([-0.01, 0.0, -1.0]), torch.tensor([0.02, 0.01, 0.0])

    def by_hand(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        changed = args[0].clone()
        for k, unit in enumerate(index.tolist()):
            value = changed[..., unit]
            changed[..., unit] = torch.where((value >= low[k]) & (value <= high[k]), 0.0, value)
        return (changed,)

    hook = model.get_submodule(sites[1].name).register_forward_pre_hook(by_hand)
    expected = losses(model, rows).sums
    hook.remove()
    with switching_off_between(model, sites, neurons, {1: (low, high)}):
        assert torch.equal(losses(model, rows).sums, expected)
    assert not torch.equal(expected, result.base.sums)


def test_a_range_spares_another_use_of_the_neuron() -> None:
    """The red neuron also says green's continuation, at a third of the activation. Off around red's mean, green stays."""
    model = planted_llama()
    layer, unit = NEURONS["red"]
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[unit, MARKERS[1]] = mlp.gate_proj.weight[unit, MARKERS[0]] / 3
        mlp.up_proj.weight[unit, MARKERS[1]] = mlp.up_proj.weight[unit, MARKERS[0]]
        mlp.down_proj.weight[VOCABULARY + CONTINUATIONS[1], unit] = 0.25
    items, rows = planted_items()
    sites = find_sites(model, 2, CPU)
    markers = [ItemRow([9, MARKERS[CLASSES.index(item.function)]], 2) for item in items]
    moments = activation_moments(model, sites, markers, [CLASSES.index(item.function) for item in items])
    neurons = NeuronSet("red", "neurons", {site.layer: site.units for site in sites}, {layer: torch.tensor([unit])})
    bounds = moments.bounds(neurons, 0, (-2.5, 2.5))
    ranged = ablate_between(model, sites, rows, [neurons], [{n: (low - 1e-3, high + 1e-3) for n, (low, high) in bounds.items()}])
    with switching_off(model, sites, neurons.indices):
        everywhere = losses(model, rows).sums
    red, green = (torch.tensor([item.function == name for item in items]) for name in ("red", "green"))
    assert float((everywhere - ranged.base.sums)[green].abs().sum()) > 0.1
    assert float((ranged.sums[0] - ranged.base.sums)[green].abs().sum()) < 1e-4
    assert float((ranged.sums[0] - ranged.base.sums)[red].sum()) > 1
    torch.testing.assert_close(ranged.sums[0][red], everywhere[red], atol=1e-3, rtol=1e-3)


def test_sets_that_cannot_be_told_apart_or_belong_elsewhere_are_refused(dense_of: Callable[[str], Path]) -> None:
    model = live(dense_of("llama"))
    sites, rows = find_sites(model, 3, CPU), rows_of(2)
    units = {site.layer: site.units for site in sites}
    neurons = NeuronSet("math", "neurons", units, {1: torch.tensor([0])})
    bounds = {1: (torch.tensor([-1.0]), torch.tensor([1.0]))}
    with pytest.raises(ValueError, match="different names"):
        ablate_between(model, sites, rows, [neurons, neurons], [bounds, bounds])
    with pytest.raises(WorkbenchError, match="set 'math': the set was chosen on a model with 9"):
        ablate_between(model, sites, rows, [NeuronSet("math", "neurons", {1: 9}, neurons.indices)], [bounds])
    assert ablate_between(model, sites, rows, [], []).sums.shape == (0, 2)
