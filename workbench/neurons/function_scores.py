"""FuncScore: how well a neuron's activation tells a function's texts from others, from one streaming pass over the texts.

FuncScore(n, f) is the average precision of the neuron's mean |activation| on an item's prompt against the label "needs function f" (Xiao et al. 2024,
equation 1). Sets are chosen on some tasks of a function and judged on others. The test of single neurons takes all tasks.

During the pass, memory holds one batch and sums of the size of a layer's neurons. The items' means go to a file with one row of all neurons per
item. A pass that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import SPLITS, Item, ItemRow, Labelled, Split, TextPart
from workbench.activations.sets import NeuronSet, top_share
from workbench.activations.sites import Progress, Site, Tokens, stream
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json, write_json
from workbench.ground.lazy import torch
from workbench.neurons.statistics import Bools, Floats, Ranked, TaskTest, task_test
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_CHECKPOINT_ROWS = 256


@dataclass(frozen=True)
class ItemScores:
    """The mean |activation| of every neuron on every item, in a file, with sums over tokens and items.

    Attributes:
        sites: The sites.
        scores: [items, units of all sites] float32 in a file.
        sums: `tokens`: tokens that counted [functions]; and of the site with number N, `total.N`: sum of |activation| over tokens
            [functions, units], and `scores.N`: sum of the scores of a task's items [tasks, units].
    """

    sites: Sequence[Site]
    scores: NDArray[np.float32]
    sums: dict[str, Tensor]

    def of_site(self, site: int) -> NDArray[np.float32]:
        """Return the scores of a site's units [items, units], a view of the file."""
        first = self.starts[site]
        return self.scores[:, first : first + self.sites[site].units]

    def summed(self, name: str) -> list[Tensor]:
        """Return the sums of a name, site by site."""
        return [self.sums[f"{name}.{site}"] for site in range(len(self.sites))]

    @property
    def starts(self) -> list[int]:
        """First column of each site."""
        return [0, *accumulate(site.units for site in self.sites)]


def item_scores(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    owners: tuple[Tensor, Tensor],
    folder: Path,
    part: TextPart = "prompt",
    *,
    progress: Progress = lambda *_: None,
) -> ItemScores:
    """Compute the score of every neuron on every item in one pass, or continue an interrupted one.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The texts.
        owners: Function and task of each text, [texts] each, for the sums.
        folder: Directory of this pass, which depends on model, texts and part. It keeps what an interrupted pass has computed.
        part: What the model reads of each text.
        progress: Progress callback.

    Raises:
        WorkbenchError: If the disk has no room for the scores.
    """
    units = sum(site.units for site in sites)
    size, path = 4 * units * len(rows), folder / "scores.f32"
    folder.mkdir(parents=True, exist_ok=True)
    state = _saved(folder) if path.is_file() and path.stat().st_size == size else None
    if not state:
        _allocate(path, size, f"the scores of {units:,} neurons on {len(rows):,} texts")
    scores = np.memmap(path, np.float32, "r+", shape=(len(rows), units))
    done, sums = state or (0, _zeros(sites, *(int(owner.max()) + 1 for owner in owners)))
    result = ItemScores(sites, scores, sums)
    starts = result.starts

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        means = _add(sums, site, activations, batch, owners)
        scores[batch.rows.numpy(), starts[site] : starts[site + 1]] = means.numpy()

    def after(count: int) -> None:
        nonlocal done
        progress(count, len(rows))
        if count - done >= _CHECKPOINT_ROWS or count == len(rows):
            scores.flush()
            _save(sums, folder, count)
            done = count

    stream(model, sites, rows, consume, part, done=done, after=after)
    return result


def _allocate(path: Path, size: int, what: str) -> None:
    """Reserve the file at once: a full disk is an error here, and a crash when the map is written."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise WorkbenchError(
            f"{path}: {what} take {size / 1e9:.1f} GB ({error.strerror})", "Make room on the disk, or use fewer texts."
        ) from None


def _zeros(sites: Sequence[Site], functions: int, tasks: int) -> dict[str, Tensor]:
    """Return sums over no tokens."""
    sums = {"tokens": torch.zeros(functions, dtype=torch.float64)}
    for name, count in (("total", functions), ("scores", tasks)):
        sums |= {f"{name}.{number}": torch.zeros(count, site.units) for number, site in enumerate(sites)}
    return sums


def _add(sums: dict[str, Tensor], site: int, activations: Tensor, batch: Tokens, owners: tuple[Tensor, Tensor]) -> Tensor:
    """Add one site's activations [batch, time, units] to the sums, and return the rows' mean |activation| [batch, units]."""
    size = activations.abs() if activations.dtype == torch.float32 else activations.float().abs()
    counted = batch.counted.to(size.dtype)
    lengths = counted.sum(1).cpu()
    total = torch.einsum("bt,btu->bu", counted, size).cpu()
    scores = total / lengths[:, None]
    function, task = (owner[batch.rows] for owner in owners)
    sums[f"total.{site}"].index_add_(0, function, total)
    sums[f"scores.{site}"].index_add_(0, task, scores)
    if site == 0:
        sums["tokens"].index_add_(0, function, lengths.double())
    return scores


def _save(sums: dict[str, Tensor], folder: Path, done: int) -> None:
    name = f"sums-{done}.safetensors"
    save_tensors(sums, folder / name)
    write_json(folder / "progress.json", {"done": done, "sums": name})
    for old in folder.glob("sums-*.safetensors"):
        if old.name != name:
            old.unlink()


def _saved(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Return (rows done, sums) of an interrupted pass; None if there is none."""
    progress = read_json(folder / "progress.json", done=int, sums=str)
    if progress is None or not is_whole(folder / progress["sums"]):
        return None
    from safetensors.torch import load_file

    return progress["done"], load_file(folder / progress["sums"])


BLOCK = 2048
"""Neurons ranked at a time."""


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
        means: Per site, mean |activation| over a function's tokens [functions, units].
        confounders: Feature of the texts -> its AUC for each function [functions].
    """

    functions: tuple[str, ...]
    sites: Sequence[Site]
    splits: Mapping[Split, SplitScores]
    test: TaskTest
    means: list[Floats]
    confounders: Mapping[str, Floats]

    def sets(self, share: float, split: Split = "train") -> dict[str, NeuronSet]:
        """Return each function's set: this share of every layer, with the highest average precision."""
        return {
            name: top_share(name, self.sites, [torch.from_numpy(ap[number].copy()) for ap in self.splits[split].ap], share)
            for number, name in enumerate(self.functions)
        }


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
