"""One streaming pass over texts: mean activations of every neuron on every item, and sums by function and task.

Memory holds one batch and sums of the size of a layer's neurons. The items' means go to a file with one row of all neurons per item, or, where that
file would be larger than a limit, into log2 histograms per function. A pass that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.labelled import PROMPT, Counted, ItemRow, Part
from workbench.emergent.ranking import BINS, log_bins
from workbench.emergent.sites import Site, visiting
from workbench.files import read_json, write_json
from workbench.lazy import no_grad, torch
from workbench.models.hooks import shaped
from workbench.models.texts import batch_limit, by_length, side_by_side
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Progress: TypeAlias = Callable[[int, int], None]
"""Takes (rows done, rows in total)."""
ScoreOf: TypeAlias = Literal["mean_abs", "max_relu"]
_CHECKPOINT_ROWS = 256


@dataclass(frozen=True)
class Tokens:
    """A batch of rows during a pass.

    Attributes:
        rows: Index of each row of the batch [batch].
        counted: [batch, time] bool: tokens that count, without padding, skipped tokens and tokens of other parts.
    """

    rows: Tensor
    counted: Tensor


Consumer: TypeAlias = "Callable[[int, Tensor, Tokens], None]"
"""Takes (index of the site, activations [batch, time, units], the batch)."""


@no_grad
def stream(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    consume: Consumer,
    counted: Counted = PROMPT,
    *,
    done: int = 0,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Pass the activations of all sites on some rows to a consumer, batch by batch.

    The output head is not computed. Rows of similar length form a batch, so the order of rows is that of their lengths.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The texts.
        consume: Consumer of a site's activations.
        counted: Tokens that the model reads, and those of them that count.
        done: Number of rows, in the order of lengths, that an earlier pass has consumed.
        after: Called after each batch with the number of rows consumed.
    """
    device = next(model.parameters()).device
    backbone = getattr(model, model.base_model_prefix, model)
    current: list[Tokens] = []

    def visit(number: int, activations: Tensor) -> None:
        batch, time = current[0].counted.shape
        consume(number, shaped(activations, batch, time), current[0])

    with visiting(model, sites, visit):
        for index in by_length([len(counted.tokens(row)) for row in rows], batch_limit(device), done):
            tokens = side_by_side([counted.tokens(rows[i]) for i in index], device)
            lengths = tokens.mask.sum(1)
            position = torch.arange(tokens.mask.shape[1], device=device)
            counts = tokens.mask.bool() & (position >= lengths.sub(1).clamp_max(counted.skip)[:, None])
            current[:] = [Tokens(torch.tensor(index), counts)]
            backbone(input_ids=tokens.tokens, attention_mask=tokens.mask, use_cache=False)
            done += len(index)
            after(done)


@dataclass(frozen=True)
class PassOptions:
    """How activations become an item's score; part of the record.

    Attributes:
        score: The mean of |activation| over an item's tokens, or the largest positive activation.
        part: Tokens that count: the prompt's, or prompt and response.
        skip: Tokens at the start of a text that do not count.
        chat: Put prompts into the tokenizer's chat template.
        disk: Largest size in bytes of the file of exact scores; beyond it, scores are kept as histograms.
    """

    score: ScoreOf = "mean_abs"
    part: Part = "prompt"
    skip: int = 1
    chat: bool = False
    disk: int = 16 * 10**9


@dataclass(frozen=True)
class PassItems:
    """The items of a pass, as tokens.

    Attributes:
        rows: Their texts.
        functions: Function of each item [items], for the sums over tokens.
        tasks: Task of each item [items], for the sums of scores.
        labels: [labels, items] bool, which histograms count; exact scores need none.
    """

    rows: Sequence[ItemRow]
    functions: Tensor
    tasks: Tensor
    labels: Tensor


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


@dataclass
class ItemScores:
    """The mean activation of every neuron on every item, in a file or as histograms.

    Attributes:
        sites: The sites.
        exact: [items, units of all sites] float32 in a file; None if only histograms are kept.
        histograms: Per site, items by (label, unit, bin) int32; empty if `exact` is kept.
        labels: [labels, items] bool: the labels that histograms count.
        statistics: Sums by function and by task.
    """

    sites: Sequence[Site]
    exact: np.memmap[Any, np.dtype[np.float32]] | None
    histograms: list[Tensor]
    labels: Tensor
    statistics: Statistics
    starts: list[int] = field(default_factory=list)

    def of_site(self, site: int) -> NDArray[np.float32]:
        """Return the exact scores of a site's units [items, units], a view of the file."""
        assert self.exact is not None
        first = self.starts[site]
        return self.exact[:, first : first + self.sites[site].units]


def item_scores(
    model: PreTrainedModel,
    sites: Sequence[Site],
    items: PassItems,
    folder: Path,
    options: PassOptions,
    *,
    progress: Progress = lambda *_: None,
) -> ItemScores:
    """Compute the score of every neuron on every item in one pass, or continue an interrupted one.

    Args:
        model: The live model.
        sites: Its sites.
        items: The items.
        folder: Directory of this pass, which depends on model, texts and options. It keeps what an interrupted pass has computed.
        options: How activations become scores.
        progress: Progress callback.
    """
    rows, units = items.rows, sum(site.units for site in sites)
    size = 4 * units * len(rows)
    folder.mkdir(parents=True, exist_ok=True)
    statistics = Statistics.zeros(sites, int(items.functions.max()) + 1, int(items.tasks.max()) + 1)
    shape, path = (len(rows), units), folder / "scores.f32"
    exact = None
    if size <= options.disk:
        state = _saved(folder) if path.is_file() and path.stat().st_size == size else None
        if not state:
            with path.open("wb") as file:  # a full disk is an error here, and not a crash when the map is written
                os.posix_fallocate(file.fileno(), 0, size)
        exact = np.memmap(path, np.float32, "r+", shape=shape)
        histograms = []
    else:
        state = _saved(folder)
        histograms = [torch.zeros(len(items.labels), site.units, BINS, dtype=torch.int32) for site in sites]
    result = ItemScores(sites, exact, histograms, items.labels, statistics, _starts(sites))
    done = _load(result, state) if state else 0
    accumulator = _Accumulator(result, items, options.score)

    def after(count: int) -> None:
        nonlocal done
        progress(count, len(rows))
        if count - done >= _CHECKPOINT_ROWS or count == len(rows):
            if exact is not None:
                exact.flush()
            _save(result, folder, count)
            done = count

    counted = Counted(options.part, options.skip)
    stream(model, sites, rows, accumulator.consume, counted, done=done, after=after)
    return result


class _Accumulator:
    """Adds a batch's activations to scores and sums."""

    def __init__(self, result: ItemScores, items: PassItems, score: ScoreOf) -> None:
        self._result, self._items, self._score = result, items, score

    def consume(self, site: int, activations: Tensor, batch: Tokens) -> None:
        """Add one site's activations [batch, time, units]."""
        result, statistics = self._result, self._result.statistics
        size = activations.abs() if activations.dtype == torch.float32 else activations.float().abs()
        counted = batch.counted.to(size.dtype)
        lengths = counted.sum(1)
        firing = torch.einsum("bt,btu->bu", counted, (activations > 0).to(size.dtype)).cpu()
        sums = torch.einsum("bt,btu->bu", counted, size).cpu()
        if self._score == "mean_abs":
            scores = sums / lengths.cpu()[:, None]
        else:
            scores = (activations.float() * counted[..., None]).amax(1).clamp_min(0).cpu()
        owners = self._items.functions[batch.rows]
        statistics.firing[site].index_add_(0, owners, firing)
        statistics.total[site].index_add_(0, owners, sums)
        statistics.scores[site].index_add_(0, self._items.tasks[batch.rows], scores)
        if site == 0:
            statistics.tokens.index_add_(0, owners, lengths.cpu().double())
        if result.exact is not None:
            first = result.starts[site]
            result.exact[batch.rows.numpy(), first : first + scores.shape[1]] = scores.numpy()
            return
        histogram = result.histograms[site]
        bins = log_bins(scores)  # [batch, units]
        unit = torch.arange(bins.shape[1])
        for row, label in zip(bins, result.labels[:, batch.rows].T, strict=True):
            for number in label.nonzero().flatten().tolist():
                histogram[number][unit, row] += 1


def _load(result: ItemScores, state: tuple[int, dict[str, Tensor]]) -> int:
    """Take the sums and histograms of an interrupted pass, and return its number of rows."""
    done, named = state
    result.statistics.load(named)
    for i in range(len(result.histograms)):
        result.histograms[i] = named[f"histogram.{i}"]
    return done


def _starts(sites: Sequence[Site]) -> list[int]:
    starts = [0]
    for site in sites:
        starts.append(starts[-1] + site.units)
    return starts[:-1]


def _save(result: ItemScores, folder: Path, done: int) -> None:
    histograms = {f"histogram.{i}": h for i, h in enumerate(result.histograms)}
    name = f"sums-{done}.safetensors"
    save_tensors({**result.statistics.tensors(), **histograms}, folder / name)
    write_json(folder / "progress.json", {"done": done, "sums": name})
    for old in folder.glob("sums-*.safetensors"):
        if old.name != name:
            old.unlink()


def _saved(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Return (rows done, sums) of an interrupted pass; None if there is none."""
    progress = read_json(folder / "progress.json", done=int, sums=str)
    if progress is None or not (folder / progress["sums"]).is_file():
        return None
    from safetensors.torch import load_file

    return progress["done"], load_file(folder / progress["sums"])
