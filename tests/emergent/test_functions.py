"""FuncScore and the test of single neurons, on scores that are made here: a neuron of a function, one of a task's wording, and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from workbench.emergent.activations import ItemScores, Statistics
from workbench.emergent.functions import FunctionScores, Settings, function_scores, histogram_labels, labels_of
from workbench.emergent.labelled import Item, ItemRow, Labelled
from workbench.emergent.lape import entropies, lape_sets
from workbench.emergent.nulls import ALPHA, task_test
from workbench.emergent.ranking import BINS, log_bins
from workbench.emergent.sites import Site

FUNCTIONS, TASKS, EACH = 4, 6, 10  # tasks of a function, three to choose and three to judge; items of a task
UNITS = 300
FUNCTION_NEURON, TASK_NEURON, RESIDENT = 7, 8, 9


def labelled() -> Labelled:
    items = [
        Item(f"{f}-{t}-{i}", f"function {f} task {t} item {i}", "", f"f{f}", f"f{f}t{t}", "train" if t < 3 else "heldout", "x:1")
        for f in range(FUNCTIONS)
        for t in range(TASKS)
        for i in range(EACH)
    ]
    return Labelled(tuple(items), "digest")


def site(layer: int = 0, units: int = UNITS) -> Site:
    return Site(layer, "neurons", f"layers.{layer}.down_proj", nn.Linear(units, 4), units)


def values(data: Labelled, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise, a neuron of function f0, a neuron of task f0t0's wording, and a resident one."""
    scores = np.random.default_rng(seed).exponential(size=(len(data.items), UNITS)).astype(np.float32)
    scores[:, FUNCTION_NEURON] += 20 * np.array([item.function == "f0" for item in data.items])
    scores[:, TASK_NEURON] += 20 * np.array([item.task == "f0t0" for item in data.items])
    scores[:, RESIDENT] += 1000
    return scores


def scored(data: Labelled, settings: Settings, exact: bool = True, seed: int = 0) -> FunctionScores:
    scores = values(data, seed)
    statistics = Statistics.zeros([site()], FUNCTIONS, FUNCTIONS * TASKS)
    owners = torch.tensor([data.functions.index(item.function) for item in data.items])
    statistics.tokens.index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
    statistics.total[0].index_add_(0, owners, torch.from_numpy(scores))
    statistics.firing[0].index_add_(0, owners, torch.from_numpy((scores > 3).astype(np.float32)))
    labels = histogram_labels(data, settings)
    statistics.scores[0].index_add_(0, torch.tensor(data.task_of_items), torch.from_numpy(scores))
    histograms = []
    if not exact:
        one_hot = nn.functional.one_hot(log_bins(torch.from_numpy(scores)), BINS)
        histograms = [torch.einsum("li,iub->lub", labels.double(), one_hot.double()).int()]
    found = ItemScores([site()], scores if exact else None, histograms, labels, statistics, [0])  # type: ignore[arg-type]
    rows = [ItemRow(list(range(5 + n % 3)), 5 + n % 3) for n in range(len(data.items))]
    return function_scores(found, data, rows, settings)


def test_a_neuron_of_a_function_is_found_and_one_of_a_wording_is_not() -> None:
    """Run with histograms too, whose bins do not hold the means over tasks."""
    for exact in (True, False):
        result = scored(labelled(), Settings(), exact)
        assert result.splits["train"].ap[0][0, FUNCTION_NEURON] == pytest.approx(1, abs=0.01)
        assert [found.nonzero()[0].tolist() for found in result.test.found[0]] == [[FUNCTION_NEURON], [], [], []]
        rows = result.summary()
        assert [row["found"] for row in rows] == [1, 0, 0, 0]
        assert rows[0]["largest_effect"] > 10 > rows[0]["smallest_effect"] > rows[1]["largest_effect"] > 0


def test_scores_equal_scikit_learn_on_the_split_s_items() -> None:
    data = labelled()
    result, scores = scored(data, Settings()), values(data)
    for split in ("train", "heldout"):
        index = [i for i, item in enumerate(data.items) if item.split == split]
        for number, name in enumerate(data.functions):
            label = [data.items[i].function == name for i in index]
            expected = [average_precision_score(label, scores[index, unit]) for unit in range(20)]
            assert result.splits[split].ap[0][number, :20] == pytest.approx(expected, abs=1e-12)
        assert result.splits[split].prevalence == pytest.approx([0.25] * 4)


def test_histograms_give_nearly_the_same_scores() -> None:
    data, settings = labelled(), Settings()
    exact, binned = scored(data, settings), scored(data, settings, exact=False)
    for split in ("train", "heldout"):
        difference = np.abs(exact.splits[split].ap[0] - binned.splits[split].ap[0])
        assert np.sqrt((difference**2).mean()) < 0.015  # 30 positive items: the order inside a bin weighs more than with hundreds
        assert binned.splits[split].ap[0][0, FUNCTION_NEURON] == pytest.approx(1, abs=0.01)


def test_sets_take_the_best_of_each_layer_and_leave_residents_out_on_request() -> None:
    data = labelled()
    result = scored(data, Settings(share=0.02))
    chosen = result.sets()["f0"]
    assert chosen.size == 6
    assert {FUNCTION_NEURON, TASK_NEURON} <= set(chosen.indices[0].tolist())
    assert result.residents[0].nonzero()[0].tolist() == [RESIDENT]
    everything = scored(data, Settings(share=1.0, keep_residents=True)).sets()["f0"]
    assert RESIDENT in everything.indices[0]
    without = scored(data, Settings(share=0.99, keep_residents=False)).sets()["f0"]
    assert RESIDENT not in without.indices[0]


def test_the_control_is_one_label_shuffled_over_the_items_of_a_split() -> None:
    data = labelled()
    labels = histogram_labels(data, Settings())
    train = torch.tensor([item.split == "train" for item in data.items])
    assert torch.equal(labels[:FUNCTIONS], torch.from_numpy(labels_of(data.items, data.functions)) & train)
    assert labels[FUNCTIONS].sum() == 30
    assert not (labels[FUNCTIONS] & ~train).any()
    assert not any(torch.equal(labels[FUNCTIONS], own) for own in labels[:FUNCTIONS])
    assert torch.equal(labels[FUNCTIONS + 1], train)


def tasks_of(
    sizes: tuple[int, ...], units: int, seed: int, spread: float = 1
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean activations of neurons that serve no function [tasks, units], and the function of each task.

    The tasks of the first function vary by `spread` times as much as others.
    """
    owners = np.repeat(np.arange(len(sizes)), sizes)
    normal = np.random.default_rng(seed).normal(size=(len(owners), units))
    return np.exp(np.where(owners == 0, spread, 1)[:, None] * normal), owners


@pytest.mark.parametrize(("sizes", "spread"), [((4, 4, 4, 4), 1), ((2, 3, 5, 8), 1), ((5, 5, 5), 2.5)])
def test_chance_finds_a_neuron_in_one_of_twenty_models(sizes: tuple[int, ...], spread: float) -> None:
    """Neurons and functions are one family; 200 models: at most 17 of them at 5 % (99 %)."""
    wrong = 0
    for seed in range(200):
        means, owners = tasks_of(sizes, 40, seed, spread)
        found = task_test([means[:, :10], means[:, 10:]], owners, seed=seed).found
        wrong += any(of_site.any() for of_site in found)
    assert 2 <= wrong <= 17


def test_what_is_found_leaves_the_comparison() -> None:
    """Chance gives the tasks of a perfect neuron to some function in 2 of 66 draws; these hide the others until it has left."""
    means, owners = tasks_of((2, 2, 8), 200, 0)
    others = task_test([means], owners).smallest[0]
    means[:, 0] = np.where(owners == 0, 5, 0)
    result = task_test([means], owners)
    assert [found.nonzero()[0].tolist() for found in result.found[0]] == [[0], [], []]
    assert result.smallest[0] == pytest.approx(others, rel=0.02)
    assert task_test([means[:, 1:]], owners, alpha=ALPHA - 2 / 66).smallest[0] > 1.05 * others


def test_effects_are_differences_in_standard_deviations() -> None:
    means, owners = tasks_of((3, 4, 6), 20, 1)
    logs = np.log(means / means.mean(0) + 0.1)
    result = task_test([means[:, :8], means[:, 8:]], owners)
    effects = np.concatenate(result.effects, 1)
    for function in range(3):
        own, others = logs[owners == function], logs[owners != function]
        within = (((own - own.mean(0)) ** 2).sum(0) + ((others - others.mean(0)) ** 2).sum(0)) / (len(owners) - 2)
        rough = (own.mean(0) - others.mean(0)) / np.sqrt(within)  # with all tasks at one scale
        assert np.corrcoef(effects[function], rough)[0, 1] > 0.9
    broken = np.concatenate([means, np.full((len(owners), 2), np.inf)], 1)
    broken[:, -1] = 0
    assert np.concatenate(task_test([broken[:, :8], broken[:, 8:]], owners).effects, 1).tolist() == [
        [*row, 0, 0] for row in effects.tolist()
    ]


@pytest.mark.parametrize(
    ("sizes", "powerless"),
    [
        ((1, 1), [0, 1]),  # one task: not told from its wording
        ((3, 3), [0, 1]),  # the functions' names swapped are 2 of 20 assignments
        ((4, 4), []),  # 2 of 70
        ((1, 4, 4), [0]),
        ((1, 10, 10), [0]),  # 1 of 21, but one task
        ((2, 2, 2), [0, 1, 2]),  # 3 of 15
        ((2,) * 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # 8 of 120
        ((2, 3, 8), []),  # 1 of 78, of 286 and of 1287
    ],
)
def test_too_few_tasks_have_no_power(sizes: tuple[int, ...], powerless: list[int]) -> None:
    """Neurons that are each active on one function alone are found, unless chance assigns exactly their tasks too often."""
    means, owners = tasks_of(sizes, 10, 2)
    for function in range(len(sizes)):
        means[:, function] = np.where(owners == function, 5, 0)
    result = task_test([means], owners)
    assert np.isinf(result.smallest).nonzero()[0].tolist() == powerless
    found = [function for function in range(len(sizes)) if result.found[0][function, function]]
    assert found == [function for function in range(len(sizes)) if function not in powerless]


def test_lape_finds_the_neuron_that_fires_on_one_function() -> None:
    assert entropies(np.array([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx([0, np.log(2)])
    result = scored(labelled(), Settings())
    sets = lape_sets(result)
    assert FUNCTION_NEURON in sets["f0"].indices[0]
    assert all(FUNCTION_NEURON not in s.indices.get(0, torch.tensor([])) for name, s in sets.items() if name != "f0")


def test_confounders_tell_functions_apart_by_wording() -> None:
    result = scored(labelled(), Settings())
    assert result.confounders["template"] == pytest.approx([1.0] * 4)  # "function N task" begins every prompt of a function
    assert result.confounders["language"] == pytest.approx([0.5] * 4)
    assert set(result.confounders) == {"length", "language", "template"}


def test_summary_has_what_the_paper_plots(tmp_path: Path) -> None:
    result = scored(labelled(), Settings())
    row = result.summary()[0]
    assert row["best_max"] == 1
    assert row["prevalence"] == pytest.approx(0.25)
    assert 0 < row["mean"] < row["top"] <= 1
    layers = result.by_layer("heldout")
    assert [entry["function"] for entry in layers] == ["f0", "f1", "f2", "f3"]
    assert layers[0]["best"] == 1
