"""FuncScore and the test of single neurons, on scores that are made here: a neuron of a function, one of a task's wording, and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from workbench.activations.labelled import Item, ItemRow, Labelled
from workbench.activations.sites import Site
from workbench.neurons.ablation import Ablation
from workbench.neurons.function_scores import FunctionScores, ItemScores, function_scores
from workbench.neurons.functions import function_rows, layer_scores
from workbench.neurons.statistics import ALPHA, POWER, Ranked, findable, task_test

FUNCTIONS, TASKS, EACH = 4, 6, 10  # tasks of a function, three to choose and three to judge; items of a task
UNITS = 300
FUNCTION_NEURON, TASK_NEURON = 7, 8


def labelled() -> Labelled:
    items = [
        Item(f"{f}-{t}-{i}", f"function {f} task {t} item {i}", "", f"f{f}", f"f{f}t{t}", "train" if t < 3 else "heldout", "x:1")
        for f in range(FUNCTIONS)
        for t in range(TASKS)
        for i in range(EACH)
    ]
    return Labelled(tuple(items), "texts.jsonl", "digest")


def site(layer: int = 0, units: int = UNITS) -> Site:
    return Site(layer, "neurons", f"layers.{layer}.down_proj", nn.Linear(units, 4), units)


def values(data: Labelled, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise, a neuron of function f0, and one of task f0t0's wording."""
    scores = np.random.default_rng(seed).exponential(size=(len(data.items), UNITS)).astype(np.float32)
    scores[:, FUNCTION_NEURON] += 20 * np.array([item.function == "f0" for item in data.items])
    scores[:, TASK_NEURON] += 20 * np.array([item.task == "f0t0" for item in data.items])
    return scores


def scored(data: Labelled) -> FunctionScores:
    scores = values(data)
    owners = torch.tensor([data.functions.index(item.function) for item in data.items])

    def summed(values: Any, of: torch.Tensor, count: int) -> torch.Tensor:
        return torch.zeros(count, UNITS).index_add_(0, of, torch.from_numpy(values))

    sums = {
        "tokens": torch.bincount(owners).double(),
        "total.0": summed(scores, owners, FUNCTIONS),
        "scores.0": summed(scores, torch.tensor(data.task_of_items), FUNCTIONS * TASKS),
    }
    found = ItemScores([site()], scores, sums)
    rows = [ItemRow(list(range(5 + n % 3)), 5 + n % 3) for n in range(len(data.items))]
    return function_scores(found, data, rows)


def ablation() -> Ablation:
    """Damage of which function f's set does f to itself."""
    changes = [[f if f == g else 99 for g in range(FUNCTIONS)] for f in range(FUNCTIONS)]
    low, high = ([[change + half for change in row] for row in changes] for half in (-0.5, 0.5))
    return Ablation.model_construct(changes=changes, low=low, high=high)


def test_a_neuron_of_a_function_is_found_and_one_of_a_wording_is_not() -> None:
    result = scored(labelled())
    assert result.splits["train"].ap[0][0, FUNCTION_NEURON] == pytest.approx(1, abs=0.01)
    assert [found.nonzero()[0].tolist() for found in result.test.found[0]] == [[FUNCTION_NEURON], [], [], []]
    rows = function_rows(result, result.sets(0.05), 0.05, ablation(), {f"f{f}": [10 + f, 20] for f in range(FUNCTIONS)})
    assert [row.found for row in rows] == [1, 0, 0, 0]
    assert [row.verdict for row in rows] == ["found", *["not found"] * 3]
    assert (rows[0].found_layers, rows[1].found_layers, rows[0].tasks) == ({"0": 1}, {}, TASKS)
    assert [(row.change, row.low, row.high, row.matched) for row in rows] == [
        (f, f - 0.5, f + 0.5, [10 + f, 20]) for f in range(FUNCTIONS)
    ]
    assert rows[0].largest_effect > 10 > (rows[0].smallest_effect or 99) > rows[1].largest_effect > 0
    assert (rows[0].best_max, rows[0].prevalence) == (1, pytest.approx(0.25))
    assert 0 < rows[0].mean < rows[0].top <= 1
    layers = layer_scores(result, "heldout")
    assert [entry.function for entry in layers] == ["f0", "f1", "f2", "f3"]
    assert layers[0].best == 1


def test_scores_equal_scikit_learn_on_the_split_s_items() -> None:
    data = labelled()
    result, scores = scored(data), values(data)
    for split in ("train", "heldout"):
        index = [i for i, item in enumerate(data.items) if item.split == split]
        for number, name in enumerate(data.functions):
            label = [data.items[i].function == name for i in index]
            expected = [average_precision_score(label, scores[index, unit]) for unit in range(20)]
            assert result.splits[split].ap[0][number, :20] == pytest.approx(expected, abs=1e-12)
        assert result.splits[split].prevalence == pytest.approx([0.25] * 4)


def test_sets_take_the_best_of_each_layer() -> None:
    result = scored(labelled())
    chosen = result.sets(0.02)["f0"]
    assert chosen.size == 6
    assert {FUNCTION_NEURON, TASK_NEURON} <= set(chosen.indices[0].tolist())


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


@pytest.mark.parametrize(("size", "tasks", "tail"), [(4, 28, 1e-5), (6, 42, 1e-7), (2, 30, 1e-4), (12, 84, 1e-6)])
def test_nine_of_ten_neurons_of_the_named_effect_exceed_the_limit(size: int, tasks: int, tail: float) -> None:
    """The limit is that of Student's t; effects are drawn, tasks are normal."""
    effect, draws = findable(tail, size, tasks), 20_000
    x = np.random.default_rng(0).normal(size=(tasks, draws))
    x[:size] += effect
    own, others = x[:size], x[size:]
    within = (((own - own.mean(0)) ** 2).sum(0) + ((others - others.mean(0)) ** 2).sum(0)) / (tasks - 2)
    statistic = (own.mean(0) - others.mean(0)) / np.sqrt(within * tasks / (size * (tasks - size)))
    assert (statistic > scipy.stats.t.isf(tail, tasks - 2)).mean() == pytest.approx(POWER, abs=0.01)


def test_more_tasks_show_smaller_effects() -> None:
    """Four tasks a function name about the effect for eight that eight tasks name; as many neurons are compared."""
    few, many = (task_test([tasks_of((n,) * 5, 300, 3)[0]], tasks_of((n,) * 5, 300, 3)[1]) for n in (4, 8))
    assert few.planned[4] == pytest.approx(few.smallest[0])
    assert few.planned[8] == pytest.approx(many.smallest[0], rel=0.1)
    assert list(few.planned.values()) == sorted(few.planned.values(), reverse=True)
    two, owners = tasks_of((2, 2), 300, 3)
    powerless = task_test([two], owners)
    assert np.isinf(powerless.smallest).all()
    assert 2 < powerless.planned[6] < 20


def test_confounders_tell_functions_apart_by_wording() -> None:
    result = scored(labelled())
    assert result.confounders["template"] == pytest.approx([1.0] * 4)  # "function N task" begins every prompt of a function
    assert result.confounders["language"] == pytest.approx([0.5] * 4)
    assert set(result.confounders) == {"length", "language", "template"}


@pytest.mark.parametrize("values", ["distinct", "few values", "zeros", "one value"])
def test_ranks_equal_scikit_learn(values: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=(211, 40)).astype(np.float32)
    if values == "few values":
        scores = rng.integers(0, 7, scores.shape).astype(np.float32)
    elif values == "zeros":
        scores *= rng.random(scores.shape) < 0.2
    elif values == "one value":
        scores[:] = 1.0
    labels = rng.random((3, 211)) < np.array([0.5, 0.1, 0.01])[:, None]
    labels[:, 0] = True
    ranked = Ranked.of(scores)
    precision, area = ranked.average_precision(labels), ranked.auc(labels)
    assert precision.shape == area.shape == (3, 40)
    for label, precisions, areas in zip(labels, precision, area, strict=True):
        for unit in range(40):
            assert precisions[unit] == pytest.approx(average_precision_score(label, scores[:, unit]), abs=1e-12)
            assert areas[unit] == pytest.approx(roc_auc_score(label, scores[:, unit]), abs=1e-12)
    assert ranked.ties == (values != "distinct")


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Ranked.of(np.array([[1.0], [np.nan]]))
