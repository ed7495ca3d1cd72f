"""FuncScore: how well a neuron's activation tells a function's texts from others, with the nulls that a claim needs.

FuncScore(n, f) is the average precision of the neuron's mean |activation| on an item's prompt against the label "needs function f" (Xiao et al. 2024,
equation 1). Neurons are chosen on some tasks of a function and judged on others.
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
from workbench.emergent.nulls import Null, NullMaxima, labels_of, shuffled_over_items, shuffled_over_tasks
from workbench.emergent.ranking import Ranked, histogram_auc, histogram_average_precision
from workbench.emergent.sets import NeuronSet, top_share
from workbench.emergent.sites import Site
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


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
Polarity: TypeAlias = Literal["one", "both"]
BLOCK = 2048
"""Neurons ranked at a time."""
TOP_MILLE = 0.005
"""The paper's second curve: the score that five in a thousand neurons of a layer exceed."""
ALPHA = 0.01


@dataclass(frozen=True)
class Settings:
    """What the paper leaves open, with the defaults that are measured best.

    Attributes:
        share: Share of neurons in a function's set.
        per: Take this share of every layer, or of all neurons.
        polarity: Only neurons that are more active on the function's texts, or also those that are less active.
        draws: Shuffled labelings of each kind, each with one label per function.
        resident: A neuron is resident if its mean |activation| is among this share of its layer on every function.
        keep_residents: Leave resident neurons in the sets.
        seed: Seed of the shuffles.
    """

    share: float = 0.05
    per: Literal["layer", "model"] = "layer"
    polarity: Polarity = "one"
    draws: int = 20
    resident: float = 0.01
    keep_residents: bool = True
    seed: int = 0


@dataclass(frozen=True)
class SplitLabels:
    """The labels of one split's items, and shuffled ones.

    Attributes:
        index: The split's items among all items.
        functions: [functions, items of the split].
        shuffled: Kind of shuffle -> [draws, functions, items of the split].
    """

    index: NDArray[np.intp]
    functions: NDArray[np.bool_]
    shuffled: Mapping[Null, NDArray[np.bool_]]

    def flat(self) -> NDArray[np.bool_]:
        """Return all labels: the functions', then the shuffled ones [labels, items of the split]."""
        drawn = [values.reshape(-1, values.shape[-1]) for values in self.shuffled.values()]
        return np.concatenate([self.functions, *drawn])


def split_labels(data: Labelled, settings: Settings) -> dict[Split, SplitLabels]:
    """Return the labels of both splits."""
    result: dict[Split, SplitLabels] = {}
    for split in SPLITS:
        index = np.array([i for i, item in enumerate(data.items) if item.split == split])
        items = [data.items[i] for i in index]
        labels = labels_of(items, data.functions)
        shuffled: dict[Null, NDArray[np.bool_]] = {"item": shuffled_over_items(labels, settings.draws, settings.seed)}
        tasks = shuffled_over_tasks(items, data.functions, settings.draws, settings.seed)
        if tasks is not None:
            shuffled["task"] = tasks
        result[split] = SplitLabels(index, labels, shuffled)
    return result


def histogram_labels(data: Labelled, settings: Settings) -> Tensor:
    """Return the labels that histograms count [labels, items]: of each split all labels, then all of its items."""
    parts = []
    for labels in split_labels(data, settings).values():
        flat = np.concatenate([labels.flat(), np.ones((1, len(labels.index)), bool)])
        whole = np.zeros((len(flat), len(data.items)), bool)
        whole[:, labels.index] = flat
        parts.append(torch.from_numpy(whole))
    return torch.cat(parts)


@dataclass(frozen=True)
class SplitScores:
    """Scores of every neuron on the items of one split.

    Attributes:
        ap: Per site, average precision [functions, units].
        auc: Per site, area under the ROC curve [functions, units].
        prevalence: Share of each function's items [functions]: the expected score of a random neuron.
        nulls: Kind of shuffle -> best scores on shuffled labels; without "task" if no function has several tasks.
        shuffled: Per site, average precision on one label that is shuffled over items [units].
    """

    ap: list[Floats]
    auc: list[Floats]
    prevalence: Floats
    nulls: Mapping[Null, NullMaxima]
    shuffled: list[Floats]


@dataclass(frozen=True)
class FunctionScores:
    """The functions' scores on both splits.

    Attributes:
        functions: Names of the functions.
        sites: The sites.
        splits: Scores on the tasks that choose neurons ("train") and on those that judge them ("heldout").
        firing: Per site, share of a function's tokens with a positive activation [functions, units].
        means: Per site, mean |activation| over a function's tokens [functions, units].
        residents: Per site, whether a neuron is among the most active ones of its layer on every function [units].
        confounders: Feature of the texts -> its AUC for each function [functions].
        settings: The settings.
    """

    functions: tuple[str, ...]
    sites: Sequence[Site]
    splits: Mapping[Split, SplitScores]
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

    def above(self, null: Null, number: int) -> dict[str, int]:
        """Return how many neurons of a function exceed a null: on the train tasks, and on both splits."""
        limits = {split: scores.nulls[null].limit(ALPHA) for split, scores in self.splits.items()}
        passed = {split: [ap[number] > limits[split] for ap in scores.ap] for split, scores in self.splits.items()}
        train = passed["train"]
        both = sum(int((a & b).sum()) for a, b in zip(train, passed["heldout"], strict=True)) if "heldout" in passed else 0
        return {"train": sum(int(a.sum()) for a in train), "both": both}

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per function: scores, neurons beyond each null, overlap of the two splits' sets, confounders."""
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
                    "beyond": {null: self.above(null, number) for null in train.nulls},
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
        splits[split] = _split_scores(scores, first, labels[split], settings)
        first += len(labels[split].flat()) + 1
    tokens = scores.statistics.tokens.numpy()[:, None]
    firing = [f.double().numpy() / tokens for f in scores.statistics.firing]
    means = [t.double().numpy() / tokens for t in scores.statistics.total]
    return FunctionScores(
        functions,
        scores.sites,
        splits,
        firing,
        means,
        [_residents(m, settings.resident) for m in means],
        confounders(data.items, rows, functions),
        settings,
    )


def _split_scores(scores: ItemScores, first: int, labels: SplitLabels, settings: Settings) -> SplitScores:
    """Return the scores on one split.

    Args:
        scores: The items' scores.
        first: Position of the split's labels in histograms.
        labels: The split's labels.
        settings: The settings.
    """
    count = len(labels.functions)
    maxima = {null: np.zeros((*drawn.shape[:2], len(scores.sites))) for null, drawn in labels.shuffled.items()}
    ap, auc, shuffled = [], [], []
    for site in range(len(scores.sites)):
        precision, area = _precision(scores, site, first, labels, settings.polarity)
        ap.append(precision[:count])
        auc.append(area)
        shuffled.append(precision[count])
        start = count
        for null, drawn in labels.shuffled.items():
            stop = start + drawn.shape[0] * drawn.shape[1]
            maxima[null][..., site] = precision[start:stop].max(1).reshape(drawn.shape[:2])
            start = stop
    prevalence = labels.functions.mean(1)
    return SplitScores(ap, auc, prevalence, {null: NullMaxima(values) for null, values in maxima.items()}, shuffled)


def _precision(scores: ItemScores, site: int, first: int, labels: SplitLabels, polarity: Polarity) -> tuple[Floats, Floats]:
    """Return average precision on all labels, shuffled ones included [labels, units], and AUC on the functions [functions, units]."""
    flat, count = labels.flat(), len(labels.functions)
    if scores.exact is None:
        counts = scores.histograms[site]
        own, total = counts[first : first + len(flat)], counts[first + len(flat)]
        ap = histogram_average_precision(own, total[None]).numpy()
        if polarity == "both":
            ap = np.maximum(ap, histogram_average_precision(total[None] - own, total[None]).numpy())
        return ap, histogram_auc(own[:count], total[None]).numpy()
    exact, aps, aucs = scores.of_site(site), [], []
    for start in range(0, exact.shape[1], BLOCK):
        ranked = Ranked.of(np.asarray(exact[:, start : start + BLOCK])[labels.index])
        ap = ranked.average_precision(flat)
        aps.append(ap if polarity == "one" else np.maximum(ap, ranked.average_precision(~flat)))
        aucs.append(ranked.auc(labels.functions))
    return np.concatenate(aps, 1), np.concatenate(aucs, 1)


def _residents(means: Floats, share: float) -> NDArray[np.bool_]:
    """Return which neurons of a layer are among the given share with the largest mean |activation| on every function."""
    limit = np.quantile(means, 1 - share, axis=1, keepdims=True)
    return np.asarray((means >= limit).all(0))
