"""FuncScore beside its nulls, on scores that are made here: a neuron of a function, one of a task's wording, and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from workbench.emergent.activations import ItemScores, Statistics
from workbench.emergent.functions import FunctionScores, Settings, function_scores, histogram_labels
from workbench.emergent.labelled import Item, ItemRow, Labelled
from workbench.emergent.lape import entropies, lape_sets
from workbench.emergent.nulls import NullMaxima, labels_of, shuffled_over_items, shuffled_over_tasks
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
    statistics = Statistics.zeros([site()], FUNCTIONS)
    owners = torch.tensor([data.functions.index(item.function) for item in data.items])
    statistics.tokens.index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
    statistics.total[0].index_add_(0, owners, torch.from_numpy(scores))
    statistics.firing[0].index_add_(0, owners, torch.from_numpy((scores > 3).astype(np.float32)))
    labels = histogram_labels(data, settings)
    histograms = []
    if not exact:
        one_hot = nn.functional.one_hot(log_bins(torch.from_numpy(scores)), BINS)
        histograms = [torch.einsum("li,iub->lub", labels.double(), one_hot.double()).int()]
    found = ItemScores([site()], scores if exact else None, histograms, labels, statistics, [0])  # type: ignore[arg-type]
    rows = [ItemRow(list(range(5 + n % 3)), 5 + n % 3) for n in range(len(data.items))]
    return function_scores(found, data, rows, settings)


def test_a_neuron_of_a_function_beats_both_nulls_and_one_of_a_wording_only_the_item_null() -> None:
    result = scored(labelled(), Settings(draws=25))
    train, heldout = result.splits["train"], result.splits["heldout"]
    assert train.ap[0][0, FUNCTION_NEURON] == 1
    assert heldout.ap[0][0, FUNCTION_NEURON] == 1
    item, task = (train.nulls[name].limit() for name in ("item", "task"))
    assert item < train.ap[0][0, TASK_NEURON] < task < 1
    assert heldout.ap[0][0, TASK_NEURON] < heldout.nulls["item"].limit()
    assert result.above("task", 0) == {"train": 1, "both": 1}
    assert result.above("item", 0) == {"train": 2, "both": 1}
    assert result.above("item", 1)["both"] == 0


def test_scores_equal_scikit_learn_on_the_split_s_items() -> None:
    data = labelled()
    result, scores = scored(data, Settings(draws=1)), values(data)
    for split in ("train", "heldout"):
        index = [i for i, item in enumerate(data.items) if item.split == split]
        for number, name in enumerate(data.functions):
            label = [data.items[i].function == name for i in index]
            expected = [average_precision_score(label, scores[index, unit]) for unit in range(20)]
            assert result.splits[split].ap[0][number, :20] == pytest.approx(expected, abs=1e-12)
        assert result.splits[split].prevalence == pytest.approx([0.25] * 4)


def test_histograms_give_nearly_the_same_scores() -> None:
    data, settings = labelled(), Settings(draws=3)
    exact, binned = scored(data, settings), scored(data, settings, exact=False)
    for split in ("train", "heldout"):
        difference = np.abs(exact.splits[split].ap[0] - binned.splits[split].ap[0])
        assert np.sqrt((difference**2).mean()) < 0.015  # 30 positive items: the order inside a bin weighs more than with hundreds
        assert binned.splits[split].ap[0][0, FUNCTION_NEURON] == pytest.approx(1, abs=0.01)
        for null in ("item", "task"):
            assert binned.splits[split].nulls[null].limit() == pytest.approx(exact.splits[split].nulls[null].limit(), abs=0.08)


def test_on_shuffled_labels_no_neuron_beats_the_model_s_null() -> None:
    """About one of a hundred labelings may pass a limit of 1 %."""
    data = labelled()
    result = scored(data, Settings(draws=100))
    items = [item for item in data.items if item.split == "train"]
    limit = result.splits["train"].nulls["item"].limit_of_model()
    labels = shuffled_over_items(labels_of(items, data.functions), 20, seed=99).reshape(-1, len(items))
    index = [i for i, item in enumerate(data.items) if item.split == "train"]
    from workbench.emergent.ranking import Ranked

    best = Ranked.of(values(data)[index]).average_precision(labels).max(1)
    assert (best > limit).mean() <= 0.05
    assert (best > result.splits["train"].prevalence[0] + 0.05).all()  # chance alone would call every one of them a finding


def test_sets_take_the_best_of_each_layer_and_leave_residents_out_on_request() -> None:
    data = labelled()
    result = scored(data, Settings(draws=1, share=0.02))
    chosen = result.sets()["f0"]
    assert chosen.size == 6
    assert {FUNCTION_NEURON, TASK_NEURON} <= set(chosen.indices[0].tolist())
    assert result.residents[0].nonzero()[0].tolist() == [RESIDENT]
    everything = scored(data, Settings(draws=1, share=1.0, keep_residents=True)).sets()["f0"]
    assert RESIDENT in everything.indices[0]
    without = scored(data, Settings(draws=1, share=0.99, keep_residents=False)).sets()["f0"]
    assert RESIDENT not in without.indices[0]


def test_both_polarities_take_the_better_of_the_two() -> None:
    data = labelled()
    one, both = scored(data, Settings(draws=1)), scored(data, Settings(draws=1, polarity="both"))
    assert (both.splits["train"].ap[0] >= one.splits["train"].ap[0]).all()
    assert (both.splits["train"].ap[0] >= 0.5).all()  # of the complement's three quarters of the items


def test_shuffles_keep_counts_and_tasks_together() -> None:
    data = labelled()
    items = [item for item in data.items if item.split == "train"]
    labels = labels_of(items, data.functions)
    over_items = shuffled_over_items(labels, 5, 0)
    assert (over_items.sum(2) == 30).all()
    assert (over_items.sum(1) == 1).all()
    over_tasks = shuffled_over_tasks(items, data.functions, 30, 0)
    assert over_tasks is not None
    assert (over_tasks.sum(2) == 30).all()
    for draw in over_tasks:
        for function in draw:
            by_task = {item.task: function[i] for i, item in enumerate(items)}
            assert sum(by_task.values()) == 3
            assert all(function[i] == by_task[item.task] for i, item in enumerate(items))
        assert not any((draw[f] == labels[f]).all() for f in range(FUNCTIONS))


def test_functions_with_one_task_each_have_no_task_null() -> None:
    items = [Item("x", "p", "", f, f, "train", "x:1") for f in "ab" for _ in range(3)]
    assert shuffled_over_tasks(items, ["a", "b"], 3, 0) is None


def test_limits_are_upper_quantiles() -> None:
    maxima = NullMaxima(np.arange(100.0).reshape(10, 2, 5))
    assert maxima.limit(0.01) == 99
    assert maxima.limit(0.1) == 90
    assert maxima.limit_of_model(0.01) == 99
    assert maxima.level(0.01) == 0.01
    assert NullMaxima(np.zeros((2, 2, 2))).level(0.01) == 1 / 9


def test_lape_finds_the_neuron_that_fires_on_one_function() -> None:
    assert entropies(np.array([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx([0, np.log(2)])
    result = scored(labelled(), Settings(draws=1))
    sets = lape_sets(result)
    assert FUNCTION_NEURON in sets["f0"].indices[0]
    assert all(FUNCTION_NEURON not in s.indices.get(0, torch.tensor([])) for name, s in sets.items() if name != "f0")


def test_confounders_tell_functions_apart_by_wording() -> None:
    result = scored(labelled(), Settings(draws=1))
    assert result.confounders["template"] == pytest.approx([1.0] * 4)  # "function N task" begins every prompt of a function
    assert result.confounders["language"] == pytest.approx([0.5] * 4)
    assert set(result.confounders) == {"length", "language", "template"}


def test_summary_has_what_the_paper_plots(tmp_path: Path) -> None:
    result = scored(labelled(), Settings(draws=2))
    row = result.summary()[0]
    assert row["best_max"] == 1
    assert row["prevalence"] == pytest.approx(0.25)
    assert 0 < row["mean"] < row["top"] <= 1
    layers = result.by_layer("heldout")
    assert [entry["function"] for entry in layers] == ["f0", "f1", "f2", "f3"]
    assert layers[0]["best"] == 1
