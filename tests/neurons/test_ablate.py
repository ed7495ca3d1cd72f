"""Neuron sets that are switched off: planted neurons, controls of equal size, overlaps, and sites of all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds import dense
from worlds.planted import CLASSES, NEURONS, planted_items, planted_llama
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import ItemLosses, SetLosses, losses
from workbench.activations.sets import NeuronSet, set_of
from workbench.activations.sites import Site, find_sites, visiting
from workbench.ground.errors import WorkbenchError
from workbench.neurons.controls import ablate, controls, matched_set, mean_overlap, random_set
from workbench.neurons.damage import coupling, dominant_rows, perplexity_changes


def planted_set(name: str, sites: Any) -> NeuronSet:
    layer, unit = NEURONS[name]
    chosen = [torch.tensor([unit] if site.layer == layer else [], dtype=torch.long) for site in sites]
    return set_of(name, sites, chosen)


def test_planted_neurons_serve_their_own_class() -> None:
    """The own class loses three times what any other loses and more; the model is bit for bit as before."""
    model = planted_llama()
    sites = find_sites(model, 2, CPU)
    items, rows = planted_items()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = losses(model, rows)
    found = ablate(model, sites, rows, [planted_set(name, sites) for name in CLASSES])
    assert torch.equal(found.base.sums, plain.sums)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(losses(model, rows).sums, plain.sums)
    functions = torch.tensor([CLASSES.index(item.function) for item in items])
    changes = perplexity_changes(found, functions)
    own = changes.diagonal()
    assert (own > 0.8).all()
    assert (own > 3 * (changes - torch.diag(own)).abs().amax(1)).all()
    assert dominant_rows(changes).all()
    assert float(coupling(changes)) < 0.05


def test_changes_are_those_of_counted_items() -> None:
    """By hand: items 0 and 1 are of function 0, with 2 and 3 tokens; item 2 of function 1 has 1."""
    base = ItemLosses(torch.tensor([2.0, 6.0, 1.0]).double(), torch.tensor([2, 3, 1]))
    found = SetLosses(("a",), base, torch.tensor([[3.0, 6.5, 1.25]]).double())
    functions = torch.tensor([0, 0, 1])
    torch.testing.assert_close(perplexity_changes(found, functions), torch.tensor([[1.5 / 5, 0.25]]).double().expm1())
    weights = torch.tensor([[2, 0, 3], [0, 1, 1]])
    weighted = torch.tensor([[[0.5, 0.25]], [[0.5 / 3, 0.25]]]).double().expm1()
    torch.testing.assert_close(perplexity_changes(found, functions, weights), weighted)
    broken = SetLosses(("a",), base, torch.tensor([[1e9, 0.0, 0.0]]).double())
    assert torch.isfinite(perplexity_changes(broken, functions)).all()


def test_wrong_sets() -> None:
    model = planted_llama()
    sites = find_sites(model, 2, CPU)
    one = planted_set("red", sites)
    with pytest.raises(ValueError, match="different names"):
        ablate(model, sites, [], [one, one])
    other = NeuronSet("red", "neurons", {0: 99}, {0: torch.tensor([98])})
    with pytest.raises(
        WorkbenchError, match="set 'red': the set was chosen on a model with 99 neurons in layer 0, this model has 32"
    ):
        ablate(model, sites, [ItemRow([6, 7], 1)], [other])


def fake_sites(units: int, layers: int = 2) -> list[Site]:
    return [Site(n, "neurons", f"{n}", torch.nn.Linear(units, 3), units) for n in range(layers)]


def test_matched_neurons_have_the_set_s_activations() -> None:
    """Means 0 to 999 in a random order: each neuron is replaced by one at most 12 ranks away, or more where the set is dense."""
    sites = fake_sites(1000)
    draw = torch.Generator().manual_seed(0)
    means = [torch.randperm(1000, generator=draw).double() for _ in sites]
    chosen = [torch.randperm(1000, generator=draw)[:50], means[1].topk(50).indices]
    like = set_of("math", sites, chosen)
    found = matched_set("m", sites, like, means, torch.Generator().manual_seed(1))
    assert {n: len(i) for n, i in found.indices.items()} == {0: 50, 1: 50}
    for layer in (0, 1):
        assert not torch.isin(found.indices[layer], like.indices[layer]).any()
        assert len(found.indices[layer].unique()) == 50
    ours, theirs = (means[0][s.indices[0]].sort().values for s in (found, like))
    assert float((ours - theirs).abs().max()) <= 25
    assert float(ours.mean() - theirs.mean()) == pytest.approx(0, abs=3)
    assert float((ours[:, None] - theirs).abs().amin(1).max()) <= 8, "one of the ten nearest that are free"
    assert float(means[1][found.indices[1]].min()) >= 890, "of the next 50 or a few more below the top 50"
    assert found.evidence["mean_activation"] < found.evidence["set_mean"]
    again = matched_set("m", sites, like, means, torch.Generator().manual_seed(1))
    assert again.digest() == found.digest()
    other = matched_set("m", sites, like, means, torch.Generator().manual_seed(2))
    assert other.digest() != found.digest()


def test_a_layer_without_other_neurons_has_no_control() -> None:
    sites = fake_sites(6, 1)
    like = set_of("math", sites, [torch.tensor([0, 1, 2, 3])])
    with pytest.raises(WorkbenchError, match="set 'math' has 4 of the 6 neurons of layer 0"):
        matched_set("m", sites, like, [torch.ones(6)], torch.Generator())


def test_random_neurons() -> None:
    sites = fake_sites(20)
    like = set_of("math", sites, [torch.arange(8), torch.tensor([], dtype=torch.long)])
    found = random_set("r", sites, like, torch.Generator().manual_seed(0))
    assert {n: len(i) for n, i in found.indices.items()} == {0: 8}
    without = random_set("r", sites, like, torch.Generator().manual_seed(0), without=True)
    assert len(without.indices[0]) == 8
    assert not torch.isin(without.indices[0], like.indices[0]).any()


def test_controls_of_equal_size_are_shared() -> None:
    sites = fake_sites(40)
    means = [torch.arange(40).double()] * 2
    pick = {"a": [3, 3], "b": [3, 3], "c": [5, 2]}
    sets = [set_of(n, sites, [torch.arange(k) * 2 for k in of]) for n, of in pick.items()]
    found = controls(sites, sets, means, draws=2)
    once = [("random", ("a", "b")), ("random", ("c",)), ("matched", ("a",)), ("matched", ("b",)), ("matched", ("c",))]
    assert [(c.kind, c.functions) for c in found] == 2 * once
    assert len({c.neurons.name for c in found}) == len(found)
    assert found[0].neurons.digest() != found[5].neurons.digest()


def test_overlaps() -> None:
    """Random sets of 5 % overlap by 5 %."""
    sites = fake_sites(2000)
    draw = torch.Generator().manual_seed(0)
    sets = [set_of(str(n), sites, [torch.randperm(2000, generator=draw)[:100] for _ in sites]) for n in range(25)]
    mean, chance = mean_overlap(sets)
    assert mean == pytest.approx(0.05, abs=0.004)
    assert chance == pytest.approx(0.05)
    a = set_of("a", sites, [torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)])
    b = set_of("b", sites, [torch.tensor([2]), torch.tensor([5])])
    assert mean_overlap([a, b]) == (0.5, pytest.approx(2 * 1 / 2000 / 2))


@pytest.mark.parametrize("family", sorted(dense.configs()))
def test_neurons_add_up_to_the_output(family: str, dense_of: Callable[[str], Path]) -> None:
    """Σ aᵢ W_out[:, i] + b is the output of the projection in every family."""
    model = live(dense_of(family))
    sites = find_sites(model, dense.LAYERS, CPU)
    assert [site.layer for site in sites] == list(range(dense.LAYERS))
    tokens = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    seen: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = [
        site.module.register_forward_hook(lambda _m, _a, out, n=n: outputs.update({n: out.detach().clone()}))
        for n, site in enumerate(sites)
    ]
    with torch.no_grad(), visiting(model, sites, lambda n, a: seen.update({n: a.clone()})):
        model(input_ids=tokens)
    for n, site in enumerate(sites):
        bias = getattr(site.module, "bias", None)
        expected = seen[n] @ site.columns() + (0 if bias is None else bias)
        torch.testing.assert_close(expected, outputs[n], atol=1e-5, rtol=0)
        torch.testing.assert_close(site.norms(), site.columns().norm(dim=1))
    for handle in handles:
        handle.remove()
