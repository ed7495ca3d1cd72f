"""One streaming pass over texts: the mean activation of every neuron on every item, and sums by function and task.

Memory holds one batch and sums of the size of a layer's neurons. The items' means go to a file with one row of all neurons per item. A pass
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.activations.labelled import ItemRow, TextPart
from workbench.activations.sites import Progress, Site, Tokens, stream
from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.lazy import torch
from workbench.weights.saving import save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CHECKPOINT_ROWS = 256


@dataclass(frozen=True)
class PassItems:
    """The items of a pass, as tokens.

    Attributes:
        rows: Their texts.
        functions: Function of each item [items], for the sums over tokens.
        tasks: Task of each item [items], for the sums of scores.
    """

    rows: Sequence[ItemRow]
    functions: Tensor
    tasks: Tensor


@dataclass
class Statistics:
    """Sums over tokens by function and neuron, and sums of items' scores by task and neuron.

    Attributes:
        tokens: Tokens that counted [functions].
        firing: Per site, tokens with a positive activation [functions, units].
        total: Per site, sum of |activation| [functions, units].
        scores: Per site, sum of the scores of a task's items [tasks, units].
    """

    tokens: Tensor
    firing: list[Tensor]
    total: list[Tensor]
    scores: list[Tensor]

    @classmethod
    def zeros(cls, sites: Sequence[Site], functions: int, tasks: int) -> Statistics:
        """Return sums over no tokens."""
        return cls(
            torch.zeros(functions, dtype=torch.float64),
            [torch.zeros(functions, site.units) for site in sites],
            [torch.zeros(functions, site.units) for site in sites],
            [torch.zeros(tasks, site.units) for site in sites],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, to be saved."""
        named = {"tokens": self.tokens}
        for name in ("firing", "total", "scores"):
            named |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(self, name))}
        return named

    def load(self, named: dict[str, Tensor]) -> None:
        """Take saved sums."""
        self.tokens = named["tokens"]
        for name in ("firing", "total", "scores"):
            setattr(self, name, [named[f"{name}.{i}"] for i in range(len(getattr(self, name)))])


@dataclass(frozen=True)
class ItemScores:
    """The mean |activation| of every neuron on every item, in a file.

    Attributes:
        sites: The sites.
        scores: [items, units of all sites] float32 in a file.
        statistics: Sums by function and by task.
    """

    sites: Sequence[Site]
    scores: NDArray[np.float32]
    statistics: Statistics

    def of_site(self, site: int) -> NDArray[np.float32]:
        """Return the scores of a site's units [items, units], a view of the file."""
        first = self.starts[site]
        return self.scores[:, first : first + self.sites[site].units]

    @property
    def starts(self) -> list[int]:
        """First column of each site."""
        return [0, *accumulate(site.units for site in self.sites)]


def item_scores(
    model: PreTrainedModel,
    sites: Sequence[Site],
    items: PassItems,
    folder: Path,
    part: TextPart = "prompt",
    *,
    progress: Progress = lambda *_: None,
) -> ItemScores:
    """Compute the score of every neuron on every item in one pass, or continue an interrupted one.

    Args:
        model: The live model.
        sites: Its sites.
        items: The items.
        folder: Directory of this pass, which depends on model, texts and part. It keeps what an interrupted pass has computed.
        part: What the model reads of each text.
        progress: Progress callback.

    Raises:
        WorkbenchError: If the disk has no room for the scores.
    """
    rows, units = items.rows, sum(site.units for site in sites)
    size, path = 4 * units * len(rows), folder / "scores.f32"
    folder.mkdir(parents=True, exist_ok=True)
    state = _saved(folder) if path.is_file() and path.stat().st_size == size else None
    if not state:
        _allocate(path, size, f"the scores of {units:,} neurons on {len(rows):,} texts")
    scores = np.memmap(path, np.float32, "r+", shape=(len(rows), units))
    statistics = Statistics.zeros(sites, int(items.functions.max()) + 1, int(items.tasks.max()) + 1)
    done = 0
    if state:
        done, named = state
        statistics.load(named)
    result = ItemScores(sites, scores, statistics)
    starts = result.starts

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        means = _add(statistics, site, activations, batch, items)
        scores[batch.rows.numpy(), starts[site] : starts[site + 1]] = means.numpy()

    def after(count: int) -> None:
        nonlocal done
        progress(count, len(rows))
        if count - done >= _CHECKPOINT_ROWS or count == len(rows):
            scores.flush()
            _save(statistics, folder, count)
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


def _add(statistics: Statistics, site: int, activations: Tensor, batch: Tokens, items: PassItems) -> Tensor:
    """Add one site's activations [batch, time, units] to the sums, and return the rows' mean |activation| [batch, units]."""
    size = activations.abs() if activations.dtype == torch.float32 else activations.float().abs()
    counted = batch.counted.to(size.dtype)
    lengths = counted.sum(1)
    firing = torch.einsum("bt,btu->bu", counted, (activations > 0).to(size.dtype)).cpu()
    sums = torch.einsum("bt,btu->bu", counted, size).cpu()
    scores = sums / lengths.cpu()[:, None]
    owners = items.functions[batch.rows]
    statistics.firing[site].index_add_(0, owners, firing)
    statistics.total[site].index_add_(0, owners, sums)
    statistics.scores[site].index_add_(0, items.tasks[batch.rows], scores)
    if site == 0:
        statistics.tokens.index_add_(0, owners, lengths.cpu().double())
    return scores


def _save(statistics: Statistics, folder: Path, done: int) -> None:
    name = f"sums-{done}.safetensors"
    save_tensors(statistics.tensors(), folder / name)
    write_json(folder / "progress.json", {"done": done, "sums": name})
    for old in folder.glob("sums-*.safetensors"):
        if old.name != name:
            old.unlink()


def _saved(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Return (rows done, sums) of an interrupted pass; None if there is none."""
    progress = read_json(folder / "progress.json", done=int, sums=str)
    if progress is None or not (folder / progress["sums"]).is_file():
        return None
    from safetensors.torch import load_file

    return progress["done"], load_file(folder / progress["sums"])
