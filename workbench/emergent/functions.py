"""FuncScore: how well a neuron's activation tells a function's texts from others, with the test that a claim needs.

FuncScore(n, f) is the average precision of the neuron's mean |activation| on an item's prompt against the label "needs function f" (Xiao et al. 2024,
equation 1). Sets are chosen on some tasks of a function and judged on others. The test of single neurons takes all tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.activations import ItemScores
from workbench.emergent.labelled import SPLITS, Item, ItemRow, Labelled, Split
from workbench.emergent.nulls import TaskTest, task_test
from workbench.emergent.ranking import Ranked, histogram_average_precision
from workbench.emergent.sets import NeuronSet, top_share
from workbench.emergent.sites import Site
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def labels_of(items: Sequence[Item], functions: Sequence[str]) -> NDArray[np.bool_]:
    """Return [functions, items]: whether an item has a function."""
    return np.array([[item.function == name for item in items] for name in functions])


def confounders(items: Sequence[Item], rows: Sequence[ItemRow], functions: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return how well plain features of the texts tell each function from the others: AUC [functions] by feature.

    `length` is the number of the prompt's tokens, `language` the share of letters outside ASCII, and `template` the share of the function's items
    among the other items that begin with the same three words.
    """
    labels = labels_of(items, functions)
    starts = [" ".join(re.findall(r"\w+", item.prompt.lower())[:3]) for item in items]
    same = np.array([[a == b for b in starts] for a in starts])
    np.fill_diagonal(same, False)
    counts = np.maximum(same.sum(1), 1)
    features: dict[str, NDArray[np.float64]] = {
        "length": np.array([row.prompt for row in rows], float),
        "language": np.array([_foreign(item.prompt) for item in items]),
    }
    result = {name: Ranked.of(values[:, None]).auc(labels)[:, 0] for name, values in features.items()}
    result["template"] = np.array([float(Ranked.of((same @ label / counts)[:, None]).auc(label[None])[0, 0]) for label in labels])
    return result


def _foreign(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(not c.isascii() for c in letters) / max(1, len(letters))


Floats: TypeAlias = NDArray[np.float64]
BLOCK = 2048
"""Neurons ranked at a time."""
TOP_MILLE = 0.005
"""The paper's second curve: the score that five in a thousand neurons of a layer exceed."""


@dataclass(frozen=True)
class Settings:
    """What the paper leaves open, with the defaults that are measured best.

    Attributes:
        share: Share of neurons in a function's set.
        per: Take this share of every layer, or of all neurons.
        resident: A neuron is resident if its mean |activation| is among this share of its layer on every function.
        keep_residents: Leave resident neurons in the sets.
        seed: Seed of the test's draws, and of the control's label.
    """

    share: float = 0.05
    per: Literal["layer", "model"] = "layer"
    resident: float = 0.01
    keep_residents: bool = True
    seed: int = 0


@dataclass(frozen=True)
class SplitLabels:
    """The labels of one split's items.

    Attributes:
        index: The split's items among all items.
        labels: Those of the functions, then one that is shuffled over items [functions + 1, items of the split].
    """

    index: NDArray[np.intp]
    labels: NDArray[np.bool_]


def split_labels(data: Labelled, settings: Settings) -> dict[Split, SplitLabels]:
    """Return the labels of both splits."""
    result: dict[Split, SplitLabels] = {}
    for split in SPLITS:
        index = np.array([i for i, item in enumerate(data.items) if item.split == split])
        labels = labels_of([data.items[i] for i in index], data.functions)
        shuffled = labels[:1, np.random.default_rng([settings.seed, 0]).permutation(len(index))]
        result[split] = SplitLabels(index, np.concatenate([labels, shuffled]))
    return result


def histogram_labels(data: Labelled, settings: Settings) -> Tensor:
    """Return the labels that histograms count [labels, items]: of each split all labels, then all of its items."""
    parts = []
    for split in split_labels(data, settings).values():
        whole = np.zeros((len(split.labels) + 1, len(data.items)), bool)
        whole[:-1, split.index] = split.labels
        whole[-1, split.index] = True
        parts.append(torch.from_numpy(whole))
    return torch.cat(parts)


@dataclass(frozen=True)
class SplitScores:
    """Scores of every neuron on the items of one split.

    Attributes:
        ap: Per site, average precision [functions, units].
        prevalence: Share of each function's items [functions]: the expected score of a random neuron.
        shuffled: Per site, average precision on one label that is shuffled over items [units].
    """

    ap: list[Floats]
    prevalence: Floats
    shuffled: list[Floats]


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
        residents: Per site, whether a neuron is among the most active ones of its layer on every function [units].
        confounders: Feature of the texts -> its AUC for each function [functions].
        settings: The settings.
    """

    functions: tuple[str, ...]
    sites: Sequence[Site]
    splits: Mapping[Split, SplitScores]
    test: TaskTest
    firing: list[Floats]
    means: list[Floats]
    residents: list[NDArray[np.bool_]]
    confounders: Mapping[str, Floats]
    settings: Settings = field(default_factory=Settings)

    def sets(self, split: Split = "train") -> dict[str, NeuronSet]:
        """Return each function's set: the neurons with the highest average precision."""
        return {name: self._set(number, name, split) for number, name in enumerate(self.functions)}

    def _set(self, number: int, name: str, split: Split) -> NeuronSet:
        scores = [torch.from_numpy(ap[number].copy()) for ap in self.splits[split].ap]
        if not self.settings.keep_residents:
            scores = [s.masked_fill(torch.from_numpy(r), -1.0) for s, r in zip(scores, self.residents, strict=True)]
        return top_share(name, self.sites, scores, self.settings.share, per=self.settings.per)

    def shuffled_set(self) -> NeuronSet:
        """Return the set that a label shuffled over the train items would choose: a control that means nothing."""
        scores = [torch.from_numpy(ap.copy()) for ap in self.splits["train"].shuffled]
        return top_share("shuffled", self.sites, scores, self.settings.share, per=self.settings.per)

    def by_layer(self, split: Split = "train") -> list[dict[str, Any]]:
        """Return, for each function and layer, the best score, the score that 5 in 1000 neurons exceed, and the mean."""
        scores = self.splits[split]
        return [
            {
                "function": name,
                "layer": site.layer,
                "best": float(ap[number].max()),
                "top": float(np.quantile(ap[number], 1 - TOP_MILLE)),
                "mean": float(ap[number].mean()),
            }
            for number, name in enumerate(self.functions)
            for site, ap in zip(self.sites, scores.ap, strict=True)
        ]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per function: scores, neurons that the test finds, overlap of the two splits' sets, confounders."""
        train = self.splits["train"]
        chosen, judged = self.sets("train"), self.sets("heldout")
        rows = []
        for number, name in enumerate(self.functions):
            best = np.array([ap[number].max() for ap in train.ap])
            others = [chosen[name].overlap(judged[other]) for other in self.functions if other != name]
            every = np.concatenate([ap[number] for ap in train.ap])
            rows.append(
                {
                    "function": name,
                    "best_median": float(np.median(best)),
                    "best_max": float(best.max()),
                    "layers_above_0.8": int((best > 0.8).sum()),
                    "top": float(np.mean([np.quantile(ap[number], 1 - TOP_MILLE) for ap in train.ap])),
                    "mean": float(every.mean()),
                    "prevalence": float(train.prevalence[number]),
                    "found": sum(int(found[number].sum()) for found in self.test.found),
                    "largest_effect": max(float(effects[number].max()) for effects in self.test.effects),
                    "smallest_effect": float(smallest) if np.isfinite(smallest := self.test.smallest[number]) else None,
                    "overlap": chosen[name].overlap(judged[name]),
                    "overlap_others": float(np.mean(others)),
                    "chance_overlap": self.settings.share,
                    "confounders": {feature: float(auc[number]) for feature, auc in self.confounders.items()},
                }
            )
        return rows


def function_scores(
    scores: ItemScores, data: Labelled, rows: Sequence[ItemRow], settings: Settings | None = None
) -> FunctionScores:
    """Compute the scores of every neuron for every function.

    Args:
        scores: The items' scores of one pass over all items of the data.
        data: The labelled texts.
        rows: The same texts as tokens.
        settings: The settings.
    """
    settings = settings or Settings()
    functions = data.functions
    labels = split_labels(data, settings)
    splits: dict[Split, SplitScores] = {}
    first = 0  # position of a split's labels in the histograms
    for split in SPLITS:
        splits[split] = _split_scores(scores, first, labels[split])
        first += len(labels[split].labels) + 1
    tokens = scores.statistics.tokens.numpy()[:, None]
    firing = [f.double().numpy() / tokens for f in scores.statistics.firing]
    means = [t.double().numpy() / tokens for t in scores.statistics.total]
    tasks, of_item = data.all_tasks, np.bincount(data.task_of_items)
    test = task_test(
        [of_site.numpy() / of_item[:, None] for of_site in scores.statistics.scores],
        np.array([functions.index(function) for function, _ in tasks]),
        seed=settings.seed,
    )
    return FunctionScores(
        functions,
        scores.sites,
        splits,
        test,
        firing,
        means,
        [_residents(m, settings.resident) for m in means],
        confounders(data.items, rows, functions),
        settings,
    )


def _split_scores(scores: ItemScores, first: int, labels: SplitLabels) -> SplitScores:
    """Return the scores on one split, whose labels begin at a place in histograms."""
    precisions = [_precision(scores, site, first, labels) for site in range(len(scores.sites))]
    return SplitScores([ap[:-1] for ap in precisions], labels.labels[:-1].mean(1), [ap[-1] for ap in precisions])


def _precision(scores: ItemScores, site: int, first: int, labels: SplitLabels) -> Floats:
    """Return average precision on all labels, the shuffled one included [labels, units]."""
    if scores.exact is None:
        counts = scores.histograms[site][first : first + len(labels.labels) + 1]
        return histogram_average_precision(counts[:-1], counts[-1:]).numpy()
    exact = scores.of_site(site)
    blocks = (np.asarray(exact[:, start : start + BLOCK])[labels.index] for start in range(0, exact.shape[1], BLOCK))
    return np.concatenate([Ranked.of(block).average_precision(labels.labels) for block in blocks], 1)


def _residents(means: Floats, share: float) -> NDArray[np.bool_]:
    """Return which neurons of a layer are among the given share with the largest mean |activation| on every function."""
    limit = np.quantile(means, 1 - share, axis=1, keepdims=True)
    return np.asarray((means >= limit).all(0))
