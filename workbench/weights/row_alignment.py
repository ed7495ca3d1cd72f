"""Weights with reordered vocabulary rows: rows of one model, and rows of other models for tokens that it lacks.

Each output row is one of the model's own rows. For a token that a model lacks, a substitute row is used: another model's row, the mean
over the models that have one, or zeros. All models use the same substitute, so the delta of a model that lacks a token is zero there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

from workbench.ground.lazy import np, torch
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements, load

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Index: TypeAlias = NDArray[np.int64]

# Values of `RowPlan.donor` that are not a model's number.
ZERO, MEAN, PAD, MADE = -1, -2, -3, -4
# Elements that are gathered at a time to make rows.
_GATHERED = 1 << 24
# With more runs of consecutive rows than _MANY_RUNS, shorter than _SHORT_RUN on average, reading the whole tensor once is faster.
_MANY_RUNS, _SHORT_RUN = 2048, 16


@dataclass(frozen=True)
class RowPlan:
    """The origin of every row of an aligned tensor, for the models 0 (the base), 1, 2 and so on.

    Attributes:
        owned: For each model, [rows]: the row in its own tensor, or -1 if it has none.
        forced: [rows], bool: rows for which every model uses the substitute.
        donor: [rows]: the model whose row is the substitute; or ZERO, MEAN (of the models that have the row), PAD (the mean of the
            model's own aligned token rows) or MADE (a combination of the base's rows).
        donor_row: [rows]: the row in the donor's tensor.
        tokens: [rows], bool: rows of tokens; the others are padding.
    """

    owned: Sequence[Index]
    forced: NDArray[np.bool_]
    donor: Index
    donor_row: Index
    tokens: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """The number of rows of the output."""
        return len(self.donor)

    @cached_property
    def own(self) -> list[Index]:
        """For each model, [rows]: the row of its own that is used, or -1 for a substitute."""
        return [np.where(self.forced, -1, index) for index in self.owned]

    def is_identity(self, model: int, rows: int) -> bool:
        """Return whether a model with `rows` rows does not change."""
        return rows == self.rows and bool((self.own[model] == np.arange(rows)).all())

    def donated(self, model: int) -> Index:
        """Return [rows]: a model's rows that are substitutes in other models, -1 elsewhere."""
        return np.where(self.donor == model, self.donor_row, np.where(self.donor == MEAN, self.owned[model], -1))

    def is_read_whole(self, model: int) -> bool:
        """Return whether a model's tensors are read completely, because the needed rows are scattered."""
        return _is_scattered(self.own[model]) or _is_scattered(self.donated(model))


@dataclass(frozen=True)
class Combination:
    """Rows that are made of rows of the base, for one tensor.

    Attributes:
        number: [rows]: for each output row, its number among those that are made, or -1.
        atoms: [made, k]: rows of the base.
        coefficients: [made, k], float32.
    """

    number: Index
    atoms: Tensor
    coefficients: Tensor


Made: TypeAlias = "Callable[[str, torch.device], Combination]"
"""Returns the combinations for a tensor's rows that are MADE."""


class WholeTensors:
    """Cache of complete tensors, so that several readers of a tensor share one copy in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: WeakValueDictionary[tuple[int, str, torch.device], Tensor] = WeakValueDictionary()

    def get(self, weights: Weights, name: str, device: torch.device) -> Tensor:
        """Return a complete tensor [rows, cols]; it stays in memory as long as a reader references it."""
        key = (id(weights), name, device)
        with self._lock:
            tensor = self._loaded.get(key)
            if tensor is None:
                spec = weights.specs[name]
                # Values of a file are exact in the file's dtype; computed values need float32.
                stored = isinstance(weights, Checkpoint) and weights.entries[name].packing is None
                dtype = spec.dtype if stored else torch.float32
                tensor = load(weights, name, dtype, device).view(spec.rows, spec.cols)
                self._loaded[key] = tensor
            return tensor


class AlignedWeights:
    """One of several models with its vocabulary tensors aligned to the output's rows; implements `weights.specs.Weights`.

    Args:
        models: All models, the base first; they have the same vocabulary tensors.
        number: The model's index in `models`.
        plan: The origin of every row.
        tensors: Names of the tensors that have one row per token.
        cache: Cache that all models share.
        inner: Weights to align instead of `models[number]`, with the same rows, such as the result of a recipe on it.
        made: Returns the combinations of rows that are MADE; None if the plan has none.
    """

    def __init__(
        self,
        models: Sequence[Weights],
        number: int,
        plan: RowPlan,
        tensors: Collection[str],
        cache: WholeTensors,
        inner: Weights | None = None,
        made: Made | None = None,
    ) -> None:
        self._models = models
        self._made = made
        self._number = number
        self._plan = plan
        self._tensors = tensors
        self._whole = cache
        self.plain = inner or models[number]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the plain weights, with the output's number of rows in vocabulary tensors."""
        rows = self._plan.rows
        return {
            name: TensorSpec((rows, *spec.shape[1:]), spec.stored) if name in self._tensors else spec
            for name, spec in self.plain.specs.items()
        }

    def origin(self, name: str) -> str | None:
        """Delegate to the plain weights."""
        return self.plain.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor's aligned rows, or the plain tensor if its rows do not change."""
        if name not in self._tensors or self._plan.is_identity(self._number, self.plain.specs[name].rows):
            return self.plain.open(name, device)
        return _AlignedSource(self, name, device)

    def _readers(self, name: str, device: torch.device) -> _Readers:
        return _Readers(self, name, device)


class _AlignedSource:
    """Reader of one tensor in the output's order of rows."""

    def __init__(self, weights: AlignedWeights, name: str, device: torch.device) -> None:
        self._plan = weights._plan
        self._own = self._plan.own[weights._number]
        self._readers = weights._readers(name, device)
        self._spec = weights.specs[name]
        self._device = device
        self._weights, self._name = weights, name

    @cached_property
    def _made(self) -> Combination:
        """The combinations of the tensor's rows that are MADE."""
        assert self._weights._made is not None
        return self._weights._made(self._name, self._device)

    @cached_property
    def _base(self) -> Tensor:
        """The base's tensor [rows, cols], of which rows are made."""
        return self._weights._whole.get(self._weights._models[0], self._name, self._device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self._read(start, stop, out)
        padding = np.flatnonzero((self._own[start:stop] < 0) & (self._plan.donor[start:stop] == PAD))
        if len(padding):
            out[torch.from_numpy(padding).to(out.device)] = self._padding.to(out.dtype)

    def _read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows start..stop, except for padding rows that the model lacks."""
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
            elif kind == MADE:
                out[_tensor(places, out)] = self._combined(start + places, out)
            elif kind >= 0:
                self._readers.donor(kind).take(self._plan.donor_row[start:stop], out, places)

    def _combined(self, rows: Index, reference: Tensor) -> Tensor:
        """Return combinations of the base's rows, for each of some output rows."""
        made, numbers = self._made, _tensor(self._made.number[rows], reference)
        result = torch.empty(len(rows), reference.shape[1], dtype=reference.dtype, device=reference.device)
        size = max(1, _GATHERED // max(1, made.atoms.shape[1] * reference.shape[1]))
        for start in range(0, len(rows), size):
            part = numbers[start : start + size]
            values = torch.einsum("nk,nkd->nd", made.coefficients[part], self._base[made.atoms[part]].float())
            result[start : start + size] = values
        return result

    def _mean(self, rows: Index, reference: Tensor) -> Tensor:
        """Return the mean over the models that have a row, for each of some output rows."""
        total = reference.new_zeros(len(rows), reference.shape[1])
        count = reference.new_zeros(len(rows), 1)
        for number, owned in enumerate(self._plan.owned):
            has_row = np.flatnonzero(owned[rows] >= 0)
            if len(has_row):
                part = reference.new_empty(len(has_row), reference.shape[1])
                self._readers.donor(number).take(owned[rows[has_row]], part)
                total[_tensor(has_row, reference)] += part
                count[_tensor(has_row, reference)] += 1
        return total.div_(count)

    @cached_property
    def _padding(self) -> Tensor:
        """The mean of the aligned token rows, summed in float64 (Hewitt 2021, "Initializing new word embeddings")."""
        total = torch.zeros(self._spec.cols, dtype=torch.float64, device=self._device)
        # A token without a row in any model has this mean for a row, and is no part of it.
        counted = self._plan.tokens & ((self._own >= 0) | (self._plan.donor != PAD))
        for start, stop in self._spec.blocks(block_elements(self._device)):
            block = torch.empty(stop - start, self._spec.cols, device=self._device)
            self._read(start, stop, block)
            total += block[_tensor(np.flatnonzero(counted[start:stop]), block)].sum(0, dtype=torch.float64)
        return (total / max(1, int(counted.sum()))).float()


class _Readers:
    """The readers that one aligned tensor needs, opened on first use."""

    def __init__(self, weights: AlignedWeights, name: str, device: torch.device) -> None:
        self._weights, self._name, self._device = weights, name, device
        self.own = AlignedRowReader(weights.plain, name, device, weights._plan.own[weights._number], weights._whole)
        self._donors: dict[int, AlignedRowReader] = {}

    def donor(self, number: int) -> AlignedRowReader:
        """Return the reader of another model's rows."""
        if number not in self._donors:
            aligned = self._weights
            self._donors[number] = AlignedRowReader(
                aligned._models[number], self._name, self._device, aligned._plan.donated(number), aligned._whole
            )
        return self._donors[number]


@dataclass(frozen=True)
class KeptRows:
    """Weights some of whose vocabulary rows are those of other weights; implements `weights.specs.Weights`.

    Attributes:
        new: The weights.
        old: The weights with the rows that are kept, of the same shapes.
        rows: [rows], bool: the rows that are kept.
        tensors: Names of the tensors that have one row per token.
    """

    new: Weights
    old: Weights
    rows: NDArray[np.bool_]
    tensors: Collection[str]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the weights."""
        return self.new.specs

    def origin(self, name: str) -> str | None:
        """Delegate to the weights."""
        return self.new.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor, whose kept rows are read from the other weights."""
        opened = self.new.open(name, device)
        return _KeptSource(opened, self.old.open(name, device), self.rows) if name in self.tensors else opened


@dataclass(frozen=True)
class _KeptSource:
    """Reader of one tensor of `KeptRows`."""

    new: Source
    old: Source
    rows: NDArray[np.bool_]

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.new.read(start, stop, out)
        for place, row, length in runs(places := np.flatnonzero(self.rows[start:stop]), start + places):
            self.old.read(row, row + length, out[place : place + length])


class AlignedRowReader:
    """Reader of one tensor's rows in any order: one read for each run of consecutive rows, or one for the whole tensor if runs are short.

    Args:
        weights: The model.
        name: A matrix, or a vector whose elements are its rows.
        device: The device of the rows.
        index: The rows that will be read, -1 for none; they decide how the tensor is read.
        cache: Cache for a tensor that is read completely.
    """

    def __init__(self, weights: Weights, name: str, device: torch.device, index: Index, cache: WholeTensors) -> None:
        self._whole = cache.get(weights, name, device) if _is_scattered(index) else None
        self._source = weights.open(name, device) if self._whole is None else None

    def take(self, index: Index, out: Tensor, places: Index | None = None) -> None:
        """Copy row index[i] to out[i], for all i or for those in `places`."""
        places = np.arange(len(index)) if places is None else places
        if not len(places):
            return
        if self._whole is not None:
            picked = self._whole[_tensor(index[places], self._whole)].to(out.dtype)
            out.index_copy_(0, _tensor(places, out), picked)
            return
        assert self._source is not None
        for offset, row, length in runs(places, index[places]):
            self._source.read(row, row + length, out[offset : offset + length])


def runs(places: Index, index: Index) -> Iterator[tuple[int, int, int]]:
    """Yield maximal runs (first place, first row, length) in which both places and rows increase by one."""
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(index) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(index)])))
    yield from zip(places[starts].tolist(), index[starts].tolist(), lengths.tolist(), strict=True)


def _is_scattered(index: Index) -> bool:
    """Return whether reading the requested rows one run at a time is slower than reading the whole tensor."""
    requested = int((index >= 0).sum())
    if requested < _MANY_RUNS:
        return False
    places = np.flatnonzero(index >= 0)
    count = int(((np.diff(index[places]) != 1) | (np.diff(places) != 1)).sum()) + 1
    return count > _MANY_RUNS and requested < count * _SHORT_RUN


def _tensor(index: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)
