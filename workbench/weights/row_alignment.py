"""Weights whose vocabulary rows stand in another order: rows gathered from one model, and from others where it has none.

A row of the output is, for each model, one of its own rows; where a model has none, all models show the same row: another
model's, the mean over the models that have one, or zeros. So a model that lacks a token has the delta zero there.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Index: TypeAlias = NDArray[np.int64]

# What `RowPlan.donor` says beside a model's number.
ZERO, MEAN, PAD = -1, -2, -3
# With more runs of consecutive rows than this, and runs this short, one read of the tensor costs less than a read a run.
_MANY_RUNS, _SHORT_RUN = 2048, 16


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of an aligned tensor come from, for models 0 (the base), 1, 2, …

    Attributes:
        owned: Per model, [rows]: its row, or -1 where it has none.
        forced: [rows], bool: rows that no model takes from itself.
        donor: [rows]: the model whose row stands in for a missing one; ZERO, MEAN over the models that have one, or PAD,
            the mean of the model's own aligned token rows.
        donor_row: [rows]: the donor's row.
        tokens: [rows], bool: rows of tokens; the others are padding.
    """

    owned: Sequence[Index]
    forced: NDArray[np.bool_]
    donor: Index
    donor_row: Index
    tokens: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.donor)

    @cached_property
    def own(self) -> list[Index]:
        """Per model: the rows that it shows of its own, -1 elsewhere."""
        return [np.where(self.forced, -1, index) for index in self.owned]

    def is_identity(self, model: int, rows: int) -> bool:
        """Whether a model of `rows` rows stays as it is."""
        return rows == self.rows and bool((self.own[model] == np.arange(rows)).all())

    def asked(self, model: int) -> Index:
        """[rows]: a model's rows that stand in for other models' missing ones, -1 elsewhere."""
        return np.where(self.donor == model, self.donor_row, np.where(self.donor == MEAN, self.owned[model], -1))

    def is_kept(self, model: int) -> bool:
        """Whether a model's tensors are read whole, because the rows that are asked for lie scattered."""
        return _scattered(self.own[model]) or _scattered(self.asked(model))


class WholeTensors:
    """Tensors that several readers have open at a time, in memory once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: WeakValueDictionary[tuple[int, str, torch.device], Tensor] = WeakValueDictionary()

    def get(self, weights: Weights, name: str, device: torch.device) -> Tensor:
        """A whole tensor [rows, cols], kept as long as somebody holds it."""
        key = (id(weights), name, device)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                spec = weights.specs[name]
                # A file's values survive in the file's dtype; computed ones need float32.
                dtype = spec.dtype if isinstance(weights, Checkpoint) else torch.float32
                found = load(weights, name, dtype, device).view(spec.rows, spec.cols)
                self._kept[key] = found
            return found


class AlignedWeights:
    """One of several models with its vocabulary tensors in the output's rows; implements `weights.specs.Weights`.

    Args:
        models: All models, the base first; they have the same vocabulary tensors.
        number: Which of them this is.
        plan: Where rows come from.
        tensors: Names of the tensors that have one row a token.
        whole: Shared by the models' views.
        inner: Weights to show instead of model `number`'s, with the same rows: the result of a recipe on it.
    """

    def __init__(
        self,
        models: Sequence[Weights],
        number: int,
        plan: RowPlan,
        tensors: Collection[str],
        whole: WholeTensors,
        inner: Weights | None = None,
    ) -> None:
        self._models = models
        self._number = number
        self._plan = plan
        self._tensors = tensors
        self._whole = whole
        self.plain = inner or models[number]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As on disk, with the output's number of rows in vocabulary tensors."""
        rows = self._plan.rows
        return {
            name: TensorSpec((rows, *spec.shape[1:]), spec.dtype) if name in self._tensors else spec
            for name, spec in self.plain.specs.items()
        }

    def origin(self, name: str) -> str | None:
        """As in the plain weights."""
        return self.plain.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """The plain tensor where nothing moves, else its aligned rows."""
        if name not in self._tensors or self._plan.is_identity(self._number, self.plain.specs[name].rows):
            return self.plain.open(name, device)
        return _AlignedSource(self, name, device)

    def _readers(self, name: str, device: torch.device) -> _Readers:
        return _Readers(self, name, device)


class _AlignedSource:
    def __init__(self, weights: AlignedWeights, name: str, device: torch.device) -> None:
        self._plan = weights._plan
        self._own = self._plan.own[weights._number]
        self._readers = weights._readers(name, device)
        self._spec = weights.specs[name]
        self._device = device

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self._read(start, stop, out)
        padding = self._missing(start, stop, PAD)
        if len(padding):
            out[torch.from_numpy(padding).to(out.device)] = self._padding.to(out.dtype)

    def _read(self, start: int, stop: int, out: Tensor) -> None:
        """Rows start..stop; padding that the model does not have is left alone."""
        own = self._own[start:stop]
        missing = own < 0
        if not missing.any():
            self._readers.own.take(own, out)
            return
        self._readers.own.take(own, out, np.flatnonzero(~missing))
        donor = self._plan.donor[start:stop]
        for kind in np.unique(donor[missing]).tolist():
            places = np.flatnonzero(missing & (donor == kind))
            if kind == ZERO:
                out[_tensor(places, out)] = 0
            elif kind == MEAN:
                out[_tensor(places, out)] = self._mean(start + places, out)
            elif kind >= 0:
                self._readers.donor(kind).take(self._plan.donor_row[start:stop], out, places)

    def _missing(self, start: int, stop: int, kind: int) -> Index:
        return np.flatnonzero((self._own[start:stop] < 0) & (self._plan.donor[start:stop] == kind))

    def _mean(self, rows: Index, like: Tensor) -> Tensor:
        total = like.new_zeros(len(rows), like.shape[1])
        count = like.new_zeros(len(rows), 1)
        for number, owned in enumerate(self._plan.owned):
            have = np.flatnonzero(owned[rows] >= 0)
            if len(have):
                part = like.new_empty(len(have), like.shape[1])
                self._readers.donor(number).take(owned[rows[have]], part)
                total[_tensor(have, like)] += part
                count[_tensor(have, like)] += 1
        return total.div_(count)

    @cached_property
    def _padding(self) -> Tensor:
        """The mean of the aligned token rows, summed in float64: Hewitt 2021, "Initializing new word embeddings"."""
        total = torch.zeros(self._spec.cols, dtype=torch.float64, device=self._device)
        for start, stop in self._spec.blocks(block_elements(self._device)):
            block = torch.empty(stop - start, self._spec.cols, device=self._device)
            self._read(start, stop, block)
            total += block[_tensor(np.flatnonzero(self._plan.tokens[start:stop]), block)].sum(0, dtype=torch.float64)
        return (total / max(1, int(self._plan.tokens.sum()))).float()


class _Readers:
    """The readers that one aligned tensor needs, opened when first asked for."""

    def __init__(self, weights: AlignedWeights, name: str, device: torch.device) -> None:
        self._weights, self._name, self._device = weights, name, device
        self.own = AlignedRowReader(weights.plain, name, device, weights._plan.own[weights._number], weights._whole)
        self._donors: dict[int, AlignedRowReader] = {}

    def donor(self, number: int) -> AlignedRowReader:
        """The reader of another model's rows."""
        if number not in self._donors:
            of = self._weights
            self._donors[number] = AlignedRowReader(
                of._models[number], self._name, self._device, of._plan.asked(number), of._whole
            )
        return self._donors[number]


class AlignedRowReader:
    """Rows of one tensor in any order. Consecutive rows are one read; with short runs only, the tensor is read once and kept.

    Args:
        weights: The model.
        name: A matrix, or a vector whose elements are its rows.
        device: Where rows go.
        index: The rows that will be asked for, -1 for none: it decides how they are read.
        whole: Where a tensor that is read whole is kept.
    """

    def __init__(self, weights: Weights, name: str, device: torch.device, index: Index, whole: WholeTensors) -> None:
        self._whole = whole.get(weights, name, device) if _scattered(index) else None
        self._source = weights.open(name, device) if self._whole is None else None

    def take(self, index: Index, out: Tensor, places: Index | None = None) -> None:
        """Put rows index[i] into out[i], for all i or those of `places`."""
        places = np.arange(len(index)) if places is None else places
        if not len(places):
            return
        if self._whole is not None:
            picked = self._whole[_tensor(index[places], self._whole)].to(out.dtype)
            out.index_copy_(0, _tensor(places, out), picked)
            return
        assert self._source is not None
        for at, row, length in runs(places, index[places]):
            self._source.read(row, row + length, out[at : at + length])


def runs(places: Index, index: Index) -> Iterator[tuple[int, int, int]]:
    """Maximal runs (first place, first row, length) in which both places and rows count up by one."""
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(index) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(index)])))
    yield from zip(places[starts].tolist(), index[starts].tolist(), lengths.tolist(), strict=True)


def _scattered(index: Index) -> bool:
    asked = int((index >= 0).sum())
    if asked < _MANY_RUNS:
        return False
    places = np.flatnonzero(index >= 0)
    count = int(((np.diff(index[places]) != 1) | (np.diff(places) != 1)).sum()) + 1
    return count > _MANY_RUNS and asked < count * _SHORT_RUN


def _tensor(index: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)
