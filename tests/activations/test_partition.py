"""Partitions: equal sizes, all experts are the dense layer, planted clusters, and each method against a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds import mixtures
from worlds.planted import planted_llama, random_rows
from worlds.project import CPU
from worlds.tiny import live

from workbench.activations.feedforward import FeedForward, FeedForwardSample, feed_forward_layers, sample_feed_forward
from workbench.activations.labelled import ItemRow
from workbench.activations.losses import losses
from workbench.activations.partition import (
    METHODS,
    Division,
    Partition,
    PartitionMethod,
    assign,
    balanced_kmeans,
    divide,
    marked,
    means,
)
from workbench.activations.selectors import centroids, dense_difference, oracle, selecting
from workbench.activations.sites import find_sites
from workbench.ground.errors import WorkbenchError

ROWS = random_rows([12] * 8)
FAMILIES = ("llama", "qwen3", "phi3", "gpt2", "opt", "gpt_neox", "gemma2", "olmo2")


def opened(
    model: Any, depth: int = 3, rows: list[ItemRow] | None = None, size: int = 60
) -> tuple[tuple[FeedForward, ...], FeedForwardSample]:
    layers = feed_forward_layers(model, find_sites(model, depth, CPU))
    return layers, sample_feed_forward(model, layers, rows or ROWS, size=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_the_dense_layer(family: str, dense_of: Callable[[str], Path]) -> None:
    """Sizes are equal, every neuron is in one expert, the experts add up to the layer, and the model's losses stay the same bits."""
    model = live(dense_of(family))
    layers, sample = opened(model)
    units = layers[0].site.units
    for method in METHODS:
        partition = divide(Division(method, 4), layers, sample)
        for of in partition.layers.values():
            assert of.experts.shape == (4, units // 4)
            assert of.experts.flatten().sort().values.tolist() == list(range(units))
            assert of.members()[of.experts[2]].tolist() == [2] * (units // 4)
        assert partition.shared == ((1 if method == "cmoe" else 0),) * len(layers)
        assert dense_difference(sample, partition) <= 1e-5
        rows = random_rows([12] * 3)
        with selecting(model, layers, partition, oracle(layers, partition), 4):
            everything = losses(model, rows)
        assert torch.equal(everything.sums, losses(model, rows).sums)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.part("neurons")
def test_a_sample_has_what_the_layers_read(family: str, dense_of: Callable[[str], Path]) -> None:
    """Activations are those of the drawn tokens, and follow from the inputs by the layer's own matrices, row by row."""

    from workbench.neurons.sparsity import token_sample

    model = live(dense_of(family))
    layers, sample = opened(model)
    same = token_sample(model, [layer.site for layer in layers], ROWS, size=60)
    for number, layer in enumerate(layers):
        x, a = sample.inputs[number], sample.activations[number]
        assert len(x) == len(a) == sample.tokens == 60
        torch.testing.assert_close(a, same.activations[number], atol=1e-5, rtol=1e-4)
        if layer.is_gated:
            expected = layer.activated(x @ layer.gate_rows().T) * (x @ layer.up_rows().T)
        else:
            bias: Any = layer.reader.bias
            expected = layer.activated(x @ layer.gate_rows().T + bias.detach())
        torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sample.magnitudes(number)[:, 5], a[:, 5].abs() * layer.site.columns()[5].norm())


def planted(kind: str) -> tuple[Any, Tensor]:
    """A llama whose layers have eight groups of four neurons in a random order, with the group of each neuron: `weights`, neurons with
    similar gates; `texts`, neurons with different gates that see the same eight tokens."""
    model = planted_llama(noise=0.0)
    draw = torch.Generator().manual_seed(5)
    groups = torch.arange(8).repeat_interleave(4)[torch.randperm(32, generator=draw)]
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            mlp.down_proj.weight.normal_(0, 0.01, generator=draw)
            mlp.up_proj.weight.fill_(0.1)
            if kind == "weights":
                mlp.gate_proj.weight.copy_(torch.eye(8, 64)[groups] + 0.02 * torch.randn(32, 64, generator=draw))
            else:  # a gate that is open on three tokens of the group, with a weight of its own for each
                mlp.gate_proj.weight.fill_(-1.0)
                for unit, group in enumerate(groups.tolist()):
                    mlp.gate_proj.weight[unit, 3 * group : 3 * group + 3] = 1 + torch.rand(3, generator=draw)
    return model, groups


def found(partition: Partition, groups: Tensor) -> bool:
    """Return True if each expert of each layer is one of the groups."""
    return all(len(set(groups[expert].tolist())) == 1 for of in partition.layers.values() for expert in of.experts)


@pytest.mark.parametrize(("method", "kind"), [("kmeans", "weights"), ("coactivation", "texts")])
def test_planted_groups_are_found(method: PartitionMethod, kind: str) -> None:
    model, groups = planted(kind)
    layers, sample = opened(model, 2, random_rows([12] * 30, words=24), 400)
    assert found(divide(Division(method, 8, shared=0), layers, sample), groups)
    assert not found(divide(Division("random", 8), layers), groups)


def test_shared_experts_take_the_neurons_that_are_active_most_often() -> None:
    model, _ = planted("texts")
    layers, sample = opened(model, 2, random_rows([12] * 30, words=24), 400)
    for method in ("random", "kmeans", "coactivation"):
        partition = divide(Division(method, 8, shared=2), layers, sample)
        assert partition.shared == (2, 2)
        for number, of in enumerate(partition.layers.values()):
            rates = marked(sample.magnitudes(number), 3).double().mean(0)
            fixed = of.experts[:2].flatten()
            others = of.experts[2:].flatten()
            assert float(rates[fixed].min()) >= float(rates[others].max())


def test_shared_experts_of_cmoe_are_three_of_eight() -> None:
    layers, sample = opened(planted_llama(noise=0.0), 2, random_rows([12] * 30, words=24))
    for experts, most, expected in ((8, None, 3), (16, None, 6), (32, None, 12), (8, 2, 2), (16, 99, 6), (4, 0, 0)):
        assert divide(Division("cmoe", experts, most_shared=most), layers, sample).shared == (expected,) * 2


def test_cmoe_against_a_direct_computation(dense_of: Callable[[str], Path]) -> None:
    """Markers token by token, shared experts by rate, and the exact assignment to the markers of the next neurons."""
    from scipy.optimize import linear_sum_assignment

    layers, sample = opened(live(dense_of("llama")))
    partition = divide(Division("cmoe", 6, shared=2), layers, sample)
    layer, of = layers[1], partition.layers[1]
    gate, up = (rows / rows.norm(dim=1, keepdim=True) for rows in (layer.gate_rows(), layer.up_rows()))
    markers = torch.zeros(sample.tokens, 48)
    for t, x in enumerate(sample.inputs[1]):
        h = torch.nn.functional.silu(gate @ (x / x.norm())) * (up @ (x / x.norm()))
        markers[t, h.abs().argsort(descending=True)[:10]] = 1
    order = markers.sum(0).argsort(descending=True, stable=True)
    assert sorted(of.experts[:2].flatten().tolist()) == sorted(order[:16].tolist())
    rest = torch.tensor(sorted(order[16:].tolist()))
    costs = torch.stack([(markers[:, rest] - markers[:, [c]]).abs().sum(0) for c in order[16:20].tolist()], 1)
    _, slots = linear_sum_assignment(costs.repeat_interleave(8, 1).numpy())
    expected = float(costs[range(32), slots // 8].sum())
    members = of.members()[rest] - 2
    assert float(costs[range(32), members].sum()) == pytest.approx(expected)


def test_centroids_are_means_of_gate_rows(dense_of: Callable[[str], Path]) -> None:
    layers, sample = opened(live(dense_of("llama")))
    partition = divide(Division("kmeans", 4), layers, sample)
    expected = torch.stack([layers[2].gate_rows()[expert].mean(0) for expert in partition.layers[2].experts])
    torch.testing.assert_close(centroids(layers, partition).rows[2], expected)


@pytest.mark.parametrize(
    ("method", "experts", "shared", "with_texts", "message"),
    [
        ("kmeans", 5, None, True, "layer 0 has 48 neurons, which 5 experts do not divide into equal parts"),
        ("kmeans", 1, None, True, "at least 2 experts, found 1"),
        ("kmeans", 4, 4, True, "0 to 3 shared experts of 4, found 4"),
        ("cmoe", 4, None, False, "a partition by cmoe looks at activations, and has no texts"),
        ("kmeans", 4, 1, False, "a partition by kmeans with shared experts looks at activations"),
    ],
)
def test_bad_partitions(
    method: PartitionMethod, experts: int, shared: int | None, with_texts: bool, message: str, dense_of: Callable[[str], Path]
) -> None:
    layers, sample = opened(live(dense_of("llama")))
    with pytest.raises(WorkbenchError, match=message):
        divide(Division(method, experts, shared=shared), layers, sample if with_texts else None)


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    model = live(mixtures.save_mixture("mixtral", tmp_path / "mixtral"))
    with pytest.raises(WorkbenchError, match=r"layer 0 is a mixture of experts already \(2 such layers\)"):
        feed_forward_layers(model, find_sites(model, mixtures.LAYERS, CPU))


def least_cost(costs: torch.Tensor) -> float:
    """The least total cost of all assignments of equal size, by enumeration."""
    points, clusters = costs.shape
    slots = [c for c in range(clusters) for _ in range(points // clusters)]
    return min(float(costs[range(points), list(order)].sum()) for order in set(permutations(slots)))


@pytest.mark.parametrize("seed", range(5))
def test_assignment_has_the_least_cost(seed: int) -> None:
    costs = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed))
    members = assign(costs)
    assert torch.bincount(members, minlength=3).tolist() == [2, 2, 2]
    assert float(costs[range(6), members].sum()) == pytest.approx(least_cost(costs), abs=1e-6)


def test_greedy_assignment_is_balanced_and_near() -> None:
    """The greedy assignment costs no more than a fifth more than the exact one on random points, and is never below it."""
    points = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))
    costs = torch.cdist(points, points[:8]).square()
    exact, greedy = assign(costs), assign(costs, exact=False)
    assert torch.bincount(greedy, minlength=8).tolist() == [12] * 8
    of = [float(costs[range(96), members].sum()) for members in (exact, greedy)]
    assert of[0] <= of[1] <= 1.2 * of[0]


def test_points_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 points cannot form 3 clusters of equal size"):
        assign(torch.rand(7, 3))


@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found(seed: int) -> None:
    """Four groups around far centers, shuffled: each cluster is one group, whatever the seed of the first centers."""
    draw = torch.Generator().manual_seed(9)
    labels = torch.arange(4).repeat_interleave(10)[torch.randperm(40, generator=draw)]
    points = 5 * torch.eye(4, 8)[labels] + 0.3 * torch.randn(40, 8, generator=draw)
    members = balanced_kmeans(points, 4, seed=seed)
    assert torch.bincount(members, minlength=4).tolist() == [10] * 4
    assert len(set(zip(labels.tolist(), members.tolist(), strict=True))) == 4
    torch.testing.assert_close(means(points, members, 4)[members[0]], points[labels == labels[0]].mean(0))


def test_equal_points_are_divided() -> None:
    assert torch.bincount(balanced_kmeans(torch.ones(12, 3), 4), minlength=4).tolist() == [3] * 4
