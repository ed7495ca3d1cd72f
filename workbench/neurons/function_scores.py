"""FuncScore: how well a neuron's activation tells a function's texts from others, with the test that a claim needs.

FuncScore(n, f) is the average precision of the neuron's mean |activation| on an item's prompt against the label "needs function f" (Xiao et al. 2024,
equation 1). Sets are chosen on some tasks of a function and judged on others. The test of single neurons takes all tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.activations.labelled import SPLITS, Item, ItemRow, Labelled, Split
from workbench.activations.sets import NeuronSet, top_share
from workbench.activations.sites import Site
from workbench.lazy import torch
from workbench.neurons.scoring import ItemScores
from workbench.neurons.statistics import Bools, Floats, Ranked, TaskTest, task_test

BLOCK = 2048
"""Neurons ranked at a time."""
RESIDENT = 0.01
"""A neuron is resident if its mean |activation| is among this share of its layer on every function."""


@dataclass(frozen=True)
class SplitScores:
    """Scores of every neuron on the items of one split.

    Attributes:
        ap: Per site, average precision [functions, units].
        prevalence: Share of each function's items [functions]: the expected score of a random neuron.
    """

    ap: list[Floats]
    prevalence: Floats


@dataclass(frozen=True)
class FunctionScores:
    """The functions' scores on both splits.

    Attributes:
        functions: Names of the functions.
        sites: The sites.
        splits: Scores on the tasks that choose sets ("train") and on those that judge them ("heldout").
        test: The neurons that the test over all tasks finds.
        firing: Per site, share of a function's tokens with a positive activation [functions, units].
        means: Per site, mean |activation| over a function's tokens [functions, units].
        confounders: Feature of the texts -> its AUC for each function [functions].
    """

    functions: tuple[str, ...]
    sites: Sequence[Site]
    splits: Mapping[Split, SplitScores]
    test: TaskTest
    firing: list[Floats]
    means: list[Floats]
    confounders: Mapping[str, Floats]

    def sets(self, share: float, split: Split = "train") -> dict[str, NeuronSet]:
        """Return each function's set: this share of every layer, with the highest average precision."""
        return {
            name: top_share(name, self.sites, [torch.from_numpy(ap[number].copy()) for ap in self.splits[split].ap], share)
            for number, name in enumerate(self.functions)
        }

    def residents(self) -> list[Bools]:
        """Return, per site, which neurons are among the most active ones of their layer on every function [units]."""
        limits = [np.quantile(means, 1 - RESIDENT, axis=1, keepdims=True) for means in self.means]
        return [np.asarray((means >= limit).all(0)) for means, limit in zip(self.means, limits, strict=True)]


def function_scores(scores: ItemScores, data: Labelled, rows: Sequence[ItemRow], seed: int = 0) -> FunctionScores:
    """Compute the scores of every neuron for every function.

    Args:
        scores: The items' scores of one pass over all items of the data.
        data: The labelled texts.
        rows: The same texts as tokens.
        seed: Seed of the test's draws.
    """
    functions = data.functions
    tokens = scores.sums["tokens"].numpy()[:, None]
    tasks, of_item = data.all_tasks, np.bincount(data.task_of_items)
    test = task_test(
        [of_site.numpy() / of_item[:, None] for of_site in scores.summed("scores")],
        np.array([functions.index(function) for function, _ in tasks]),
        seed=seed,
    )
    return FunctionScores(
        functions,
        scores.sites,
        {split: _split_scores(scores, data, split) for split in SPLITS},
        test,
        [firing.double().numpy() / tokens for firing in scores.summed("firing")],
        [total.double().numpy() / tokens for total in scores.summed("total")],
        confounders(data.items, rows, functions),
    )


def _split_scores(scores: ItemScores, data: Labelled, split: Split) -> SplitScores:
    """Return average precision on one split."""
    index = np.array([i for i, item in enumerate(data.items) if item.split == split])
    labels = labels_of([data.items[i] for i in index], data.functions)
    precisions = []
    for site in range(len(scores.sites)):
        of_site = scores.of_site(site)
        blocks = (np.asarray(of_site[:, start : start + BLOCK])[index] for start in range(0, of_site.shape[1], BLOCK))
        precisions.append(np.concatenate([Ranked.of(block).average_precision(labels) for block in blocks], 1))
    return SplitScores(precisions, labels.mean(1))


def labels_of(items: Sequence[Item], functions: Sequence[str]) -> Bools:
    """Return [functions, items]: whether an item has a function."""
    return np.array([[item.function == name for item in items] for name in functions])


def confounders(items: Sequence[Item], rows: Sequence[ItemRow], functions: Sequence[str]) -> dict[str, Floats]:
    """Return how well plain features of the texts tell each function from the others: AUC [functions] by feature.

    `length` is the number of the prompt's tokens, `language` the share of letters outside ASCII, and `template` the share of the function's items
    among the other items that begin with the same three words.
    """
    labels = labels_of(items, functions)
    starts = [" ".join(re.findall(r"\w+", item.prompt.lower())[:3]) for item in items]
    same = np.array([[a == b for b in starts] for a in starts])
    np.fill_diagonal(same, False)
    counts = np.maximum(same.sum(1), 1)
    features: dict[str, Floats] = {
        "length": np.array([row.prompt for row in rows], float),
        "language": np.array([_foreign(item.prompt) for item in items]),
    }
    result = {name: Ranked.of(values[:, None]).auc(labels)[:, 0] for name, values in features.items()}
    result["template"] = np.array([float(Ranked.of((same @ label / counts)[:, None]).auc(label[None])[0, 0]) for label in labels])
    return result


def _foreign(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(not c.isascii() for c in letters) / max(1, len(letters))
