"""Damage matrices and mask curves with intervals over resampled tasks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from worlds.planted import CLASSES, NEURONS, planted_items, planted_llama
from worlds.project import CPU

from workbench.activations.labelled import Item
from workbench.activations.losses import ItemLosses, SetLosses
from workbench.activations.sets import NeuronSet, set_of
from workbench.activations.sites import find_sites
from workbench.ground.errors import WorkbenchError
from workbench.neurons.controls import ablate, controls
from workbench.neurons.damage import ItemGroups, damage_table
from workbench.neurons.masking import MaskedLosses, mask_curves
from workbench.scores.statistics import clustered_se, codes, upper_t


def item(function: str, task: str) -> Item:
    return Item("", "", "", function, task, "heldout", "")


def test_groups_and_weights() -> None:
    """Tasks are drawn as a whole, within each function; a function with one task is drawn by items, with a warning."""
    items = [item("a", "x"), item("b", "z"), item("a", "y"), item("b", "z"), item("a", "x")]
    groups = ItemGroups.of(items)
    assert groups.functions == ("a", "b")
    assert groups.function.tolist() == [0, 1, 0, 1, 0]
    assert groups.cluster[0] == groups.cluster[4] != groups.cluster[2]
    assert len(set(groups.cluster.tolist())) == 4
    assert groups.warnings == ("function 'b' has one held-out task: its interval treats items as independent and is too narrow",)
    weights = groups.weights(reps=500)
    assert weights.shape == (500, 5)
    assert torch.equal(weights[:, 0], weights[:, 4])
    assert ((weights[:, 0] + weights[:, 2]) == 2).all()
    assert ((weights[:, 1] + weights[:, 3]) == 2).all()
    assert float(weights.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(weights, groups.weights(reps=500))
    assert ItemGroups.of(items, ["b", "a"]).function.tolist() == [1, 0, 1, 0, 1]
    same = ItemGroups.of([item("a", "x"), item("a", "y"), item("b", "x"), item("b", "y")])
    assert len(set(same.cluster.tolist())) == 4, "a task of the same name in another function is another cluster"
    one = ItemGroups(("a",), np.zeros(3, np.intp), np.zeros(3, np.intp))
    assert [float(end) for end in one.interval(torch.ones(10))] == [-math.inf, math.inf]


@pytest.mark.parametrize(
    ("names", "text"), [(["a", "c"], "function 'c' has no items"), (["a"], "the function 'b', which is not")]
)
def test_functions_and_items_that_do_not_fit(names: list[str], text: str) -> None:
    with pytest.raises(WorkbenchError, match=text):
        ItemGroups.of([item("a", "x"), item("b", "x")], names)


@pytest.mark.parametrize("tasks", [4, 20])
def test_intervals_are_as_wide_as_those_of_t(tasks: int) -> None:
    """Compare with the t interval of a mean over tasks of one item each."""
    values = np.random.default_rng(3).normal(size=tasks)
    groups = ItemGroups.of([item("a", str(n)) for n in range(tasks)])
    draws = groups.weights(reps=40_000) @ torch.from_numpy(values) / tasks
    low, high = groups.interval(draws)
    half = upper_t(0.025, tasks - 1) * clustered_se(values, codes(list(range(tasks))))
    assert float(high - low) == pytest.approx(2 * half, rel=0.12 if tasks == 20 else 0.45)
    assert groups.interval(draws[:, None].repeat(1, 2))[0].shape == (2,)


def planted_sets(sites: Any) -> list[NeuronSet]:
    """One neuron in each layer: the planted one and a silent one beside it."""
    sets = []
    for name in CLASSES:
        layer, unit = NEURONS[name]
        sets.append(set_of(name, sites, [torch.tensor([unit if site.layer == layer else 30]) for site in sites]))
    return sets


def test_planted_sets_and_their_controls() -> None:
    """Own classes lose in every resampling, more than by each control; controls of all kinds are there."""
    model = planted_llama()
    sites = find_sites(model, 2, CPU)
    items, rows = planted_items()
    sets = planted_sets(sites)
    means = [torch.arange(site.units).double() for site in sites]
    compared = controls(sites, sets, means)
    table = damage_table(ablate(model, sites, rows, [*sets, *(c.neurons for c in compared)]), items, CLASSES, compared)
    assert table.functions == list(CLASSES)
    assert (table.dominant, table.dominance, table.dominant_rows) == ([True] * 3, [1, 1, 1], 3)
    low, high = table.interval
    assert low is not None
    assert high is not None
    assert table.coupling is not None
    assert low <= table.coupling <= high < 0.05
    changes, lows, highs = (torch.tensor(of) for of in (table.changes, table.low, table.high))
    assert (lows <= changes + 1e-6).all()
    assert (changes <= highs + 1e-6).all()
    assert (lows.diagonal() > 0.8).all()
    assert table.clusters == [3, 3, 3]
    assert {kind: control.kind for kind, control in table.controls.items()} == {"random": "random", "matched": "matched"}
    for control in table.controls.values():
        assert control.exceeds == [1, 1, 1]
        assert float(torch.tensor(control.changes).abs().max()) < 0.05


def made(changes: list[list[float]], names: tuple[str, ...] = ("a", "b")) -> tuple[SetLosses, list[Item]]:
    """Items of two functions with two tasks of two items; `changes` per set and task in nats per token, 2 tokens an item."""
    items = [item(f, f"{f}{t}") for f in ("a", "b") for t in (0, 1) for _ in range(2)]
    rises = torch.tensor(changes).double().repeat_interleave(2, 1) * 2
    base = ItemLosses(torch.full((8,), 4.0, dtype=torch.float64), torch.full((8,), 2))
    return SetLosses(names, base, base.sums + rises), items


def test_rows_that_dominate_in_some_resamplings() -> None:
    """Set a costs its function 1 and 0 nats by task, the other .4: the mean is .5, and in a quarter of the draws only 0."""
    result, items = made([[1.0, 0.0, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]])
    table = damage_table(result, items, ["a", "b"])
    assert table.changes == [pytest.approx([math.exp(0.5) - 1, math.exp(0.4) - 1]), pytest.approx([0, math.e - 1])]
    assert table.dominant == [True, True]
    assert table.dominance[0] == pytest.approx(0.75, abs=0.03)
    assert table.dominance[1] == 1
    assert table.base_perplexity == pytest.approx([math.e**2] * 2)
    row = (math.exp(0.4) - 1) / (math.exp(0.5) - 1)
    assert table.coupling == pytest.approx(row / 2)
    assert table.interval[1] is None, "where the own damage is 0, coupling is infinite"


def test_items_without_predicted_tokens() -> None:
    result, items = made([[1.0, 0.0, 0.4, 0.4]], ("a",))
    result.base.tokens[4:] = 0
    with pytest.raises(WorkbenchError, match="function 'b' has no item with two or more tokens"):
        damage_table(result, items, ["a", "b"])


def test_a_task_without_predicted_tokens_is_left_out() -> None:
    """Its items count for nothing, instead of leaving the function without tokens in a quarter of the resamplings."""
    result, items = made([[1.0, 0.0, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]])
    result.base.tokens[2:4] = 0
    table = damage_table(result, items, ["a", "b"])
    assert table.items == 6
    assert None not in [end for row in (*table.low, *table.high) for end in row]
    assert table.changes[0][0] == pytest.approx(math.e - 1)


def test_mask_curves() -> None:
    """Losses by hand: rises of .05 and .3 nats; intervals over four tasks are t intervals of task means."""
    items = [item("a", f"{n // 2}") for n in range(8)] + [item("b", f"{n}") for n in range(4)]
    tokens = torch.tensor([2] * 8 + [5] * 4)
    base = torch.full((12,), 3.0, dtype=torch.float64)
    spread = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5, 0.5, -0.5, -0.5, 0, 0, 0, 0]).double()
    half = base + tokens * (0.05 + 0.01 * spread)
    most = base + tokens * (0.3 + 0.1 * spread)
    masked = MaskedLosses((0.0, 50.0, 80.0), {"activation": torch.stack([base, half, most])}, tokens)
    whole, a, b = mask_curves(masked, items)
    assert [curve.function for curve in (whole, a, b)] == [None, "a", "b"]
    assert (whole.clusters, a.clusters, b.clusters) == (8, 4, 4)
    assert [point.rise for point in a.points] == pytest.approx([0, 0.05, 0.3])
    assert [point.loss for point in a.points] == pytest.approx([1.5, 1.55, 1.8])
    error = upper_t(0.025, 3) * np.std([1, -1, 0.5, -0.5], ddof=1) / 2
    assert (a.points[0].low, a.points[0].high) == (0, 0)
    assert (a.points[1].low, a.points[1].high) == pytest.approx((0.05 - 0.01 * error, 0.05 + 0.01 * error))
    assert (b.points[2].low, b.points[2].high) == pytest.approx((0.3, 0.3))
    assert (a.free, a.surely_free) == (50, 50)
    assert mask_curves(masked, items, tolerance=0.05 + 1e-9)[1].surely_free == 0
    assert mask_curves(masked, items, tolerance=0.5)[2].free == 80


def test_a_share_counts_only_if_smaller_ones_do() -> None:
    sums = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]).double()
    masked = MaskedLosses((0.0, 30.0, 60.0), {"activation": sums}, torch.tensor([1, 1]))
    assert mask_curves(masked, [item("a", "x"), item("a", "y")])[0].free == 0
