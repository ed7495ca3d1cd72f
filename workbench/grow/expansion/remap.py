"""Weights of a grown model, computed lazily from the weights before growth, and masks of its added elements in a live model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from threading import Lock
from typing import TYPE_CHECKING

from workbench.ground.files import json_digest
from workbench.ground.lazy import np, torch
from workbench.models.live import live_runs
from workbench.steps import NEW, Axis, Grown, Growth
from workbench.weights.specs import BLOCK_ELEMENTS, Source, TensorSpec, Weights, buffer, load, matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel


class GrownWeights:
    """The weights of a grown model. Bricks address the old tensors by their old names.

    Args:
        current: The weights before growth.
        growth: The method's plan.
        seed: Seed of random values.
        bricks: The base with each brick applied, by brick name.
        measured: Tensors that the method measured, which replace those of the plan.
        base: The recipe's base, for tensors that come from it.
    """

    def __init__(
        self,
        current: Weights,
        growth: Growth,
        seed: int = 0,
        bricks: Mapping[str, Weights] | None = None,
        measured: Mapping[str, Tensor] | None = None,
        base: Weights | None = None,
    ) -> None:
        self._current = current
        self.growth = growth
        self._seed = seed
        self._bricks = bricks or {}
        self._measured = measured or {}
        self._base = base
        self._held = _Held(current)

    @cached_property
    def _divided(self) -> frozenset[str]:
        """Tensors of the current model of which several grown tensors take some columns each."""
        pieces = [piece for grown in self.growth.tensors.values() for piece in (grown.parts or (grown,))]
        specs = self._current.specs
        counts = Counter(
            piece.source
            for piece in pieces
            if piece.cols is not None
            and not (piece.base or piece.brick or piece.zero)
            and np.count_nonzero(piece.cols.index != NEW) < specs[piece.source].cols
        )
        return frozenset(name for name, count in counts.items() if count > 1)

    @property
    def held_bytes(self) -> int:
        """Memory for a tensor that is divided by columns, and for the next one while threads still read the last, in bytes."""
        return 8 * max((self._current.specs[name].numel for name in self._divided), default=0)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs by the grown names."""
        return {name: self._spec(grown) for name, grown in self.growth.tensors.items()}

    def _source(self, grown: Grown) -> Weights:
        """Return the weights to which the source tensor belongs."""
        if grown.model is not None:
            return self.growth.models[grown.model].weights
        if not grown.base:
            return self._current
        assert self._base is not None, "a plan that reads the base needs `base`"
        return self._base

    def _spec(self, grown: Grown) -> TensorSpec:
        """Return the spec of a planned tensor."""
        return grown.spec(self._source(grown).specs[grown.source])

    def added(self, name: str) -> NDArray[np.bool_] | None:
        """Return a mask [rows, cols] of the elements that growth adds to a tensor, or None if it adds none."""
        grown, spec = self.growth.tensors[name], self.specs[name]
        if grown.parts and not grown.new:
            parts = [self._added(part) for part in grown.parts]
            mask = np.concatenate(parts, axis=int(self._has_joined_columns(grown)))
        else:
            mask = self._added(grown)
        return mask.reshape(spec.rows, spec.cols) if mask.any() else None

    def _added(self, grown: Grown) -> NDArray[np.bool_]:
        """Return a mask [rows, cols] of the added elements; all false if there are none."""
        spec = self._spec(grown)
        mask = grown.added(self._source(grown).specs[grown.source])
        return np.zeros((spec.rows, spec.cols), bool) if mask is None else mask.reshape(spec.rows, spec.cols)

    def _has_joined_columns(self, grown: Grown) -> bool:
        """Return whether the parts are joined by columns: then together they have more rows than the whole."""
        return sum(self._spec(part).rows for part in grown.parts) > self._spec(grown).rows

    def origin(self, name: str) -> str | None:
        """Return the base's tensor for an old tensor, or None for a new one."""
        grown = self.growth.tensors[name]
        return None if grown.new else self._current.origin(grown.source)

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor of the grown model."""
        grown = self.growth.tensors[name]
        if name in self._measured:
            return _InMemory(self._measured[name])
        if grown.parts:
            opened = [self._open_part(part, f"{name} {i}", device) for i, part in enumerate(grown.parts)]
            specs = [self._spec(part) for part in grown.parts]
            if self._has_joined_columns(grown):
                return _JoinedColumns(opened, [s.cols for s in specs])
            return _JoinedRows(opened, [s.rows for s in specs])
        return self._open_part(grown, name, device)

    def _open_part(self, grown: Grown, name: str, device: torch.device) -> Source:
        """Open a planned tensor that has no parts: from a brick, from the source weights, or as zeros."""
        if grown.zero:
            return _Zeros()
        weights = self._source(grown)
        origin = weights.origin(grown.source)
        from_brick = grown.brick is not None and origin is not None  # no brick covers a layer that growth added
        if from_brick:
            source = self._bricks[grown.brick or ""].open(origin or "", device)
        elif grown.cols is not None and not grown.base and grown.source in self._divided:
            source = self._held.open(grown.source, device)
        else:
            source = weights.open(grown.source, device)
        if not grown.reshaped and grown.scale == 1:
            return source
        return GrownSource(source, weights.specs[grown.source], grown, int(json_digest([self._seed, name])[:12], 16))


class _Held:
    """The tensor that was asked for last, in memory, so that tensors that take its columns in turn read it once.

    Threads read tensors in file order, in which those of one layer follow each other.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._lock = Lock()
        self._place: tuple[str, str] | None = None
        self._tensor: Tensor | None = None

    def open(self, name: str, device: torch.device) -> Source:
        """Return the rows of a tensor, which is read now unless it is the last one."""
        with self._lock:
            if self._tensor is None or self._place != (name, str(device)):
                self._tensor = None  # frees the last one first, unless a reader still uses it
                spec = self._weights.specs[name]
                dtype = torch.float32 if spec.is_float else spec.dtype
                self._tensor = load(self._weights, name, dtype, device).reshape(spec.rows, spec.cols)
                self._place = name, str(device)
            return _InMemory(self._tensor)


class _Zeros:
    """Rows of zeros."""

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.zero_()


class _InMemory:
    """Rows of a tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._tensor[start:stop].reshape(out.shape))


class _JoinedRows:
    """Tensors joined by rows."""

    def __init__(self, parts: Sequence[Source], rows: Sequence[int]) -> None:
        self._parts = parts
        self._ends = list(accumulate(rows))

    def read(self, start: int, stop: int, out: Tensor) -> None:
        first = 0
        for part, end in zip(self._parts, self._ends, strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                part.read(low - first, high - first, out[low - start : high - start])
            first = end


class _JoinedColumns:
    """Tensors joined by columns."""

    def __init__(self, parts: Sequence[Source], cols: Sequence[int]) -> None:
        self._parts, self._cols = parts, cols

    def read(self, start: int, stop: int, out: Tensor) -> None:
        first = 0
        for part, cols in zip(self._parts, self._cols, strict=True):
            block = torch.empty(stop - start, cols, dtype=out.dtype, device=out.device)
            part.read(start, stop, block)
            out[:, first : first + cols] = block
            first += cols


class GrownSource:
    """A tensor whose rows and columns come from another tensor, or are new.

    Random values depend only on the seed and the row, not on blocks or the device.

    Args:
        source: Source of the original tensor.
        spec: Shape and dtype of the original tensor.
        grown: Plan of the new tensor.
        seed: Seed of the tensor's random values.
    """

    def __init__(self, source: Source, spec: TensorSpec, grown: Grown, seed: int) -> None:
        self._source, self._spec, self._grown, self._seed = source, spec, grown, seed
        self._rows = grown.rows or Axis(np.arange(spec.rows))
        cols = grown.cols
        self._copied_columns: tuple[Tensor, Tensor] | None = None
        self._means: dict[int, Tensor] = {}
        if cols is not None:
            new_columns = np.flatnonzero(cols.index != NEW)
            self._copied_columns = torch.from_numpy(new_columns), torch.from_numpy(cols.index[new_columns])

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32, or in the tensor's own dtype for integers."""
        index = self._rows.index[start:stop]
        for offset, count in runs(index):
            part = out[offset : offset + count]
            if index[offset] == NEW:
                self._fill(part, start + offset)
            else:
                self._copy(int(index[offset]), part, start + offset)
        for axis, shape in ((self._rows.scale, (-1, 1)), (self._grown.cols.scale if self._grown.cols else None, (1, -1))):
            if axis is not None:
                rows = axis[start:stop] if shape == (-1, 1) else axis
                out.mul_(torch.from_numpy(rows).to(out.device).view(shape))

    def _copy(self, first: int, part: Tensor, row: int) -> None:
        """Copy rows from the source, and fill their new columns."""
        scale = self._grown.scale
        if self._copied_columns is None:
            self._source.read(first, first + len(part), part)
            if scale != 1:
                part.mul_(scale)
            return
        old_rows = torch.empty(len(part), self._spec.cols, dtype=part.dtype, device=part.device)
        self._source.read(first, first + len(part), old_rows)
        self._fill(part, row)
        new_columns, old_columns = (t.to(part.device) for t in self._copied_columns)
        copied = old_rows[:, old_columns]
        part[:, new_columns] = copied * scale if scale != 1 else copied

    def _fill(self, part: Tensor, row: int) -> None:
        """Fill rows, the first of which is `row` of the new tensor, with means of source rows or with drawn values."""
        if self._grown.means is not None:
            for i, line in enumerate(part):
                line.copy_(self._mean(self._grown.means[row + i]))
            return
        value, std = self._drawn
        part.fill_(value)
        if std > 0:
            for i, line in enumerate(part):
                generator = torch.Generator().manual_seed(self._seed ^ (row + i))
                line.add_(torch.randn(line.shape, generator=generator).to(line.device), alpha=std)

    def _mean(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the mean of some rows of the source, summed in float64; it is cached, as most rows share one mean."""
        cached = self._means.get(id(rows))
        if cached is not None:
            return cached
        total = torch.zeros(self._spec.cols, dtype=torch.float64)
        step = max(1, BLOCK_ELEMENTS // self._spec.cols)
        for start, length in runs(rows):
            for first in range(int(rows[start]), int(rows[start]) + length, step):
                block = torch.empty(min(step, int(rows[start]) + length - first), self._spec.cols)
                self._source.read(first, first + len(block), block)
                total += block.sum(0, dtype=torch.float64)
        mean = self._means[id(rows)] = (total / len(rows)).float()
        return mean

    @cached_property
    def _drawn(self) -> tuple[float, float]:
        """Mean and standard deviation of new elements."""
        if not self._grown.like:
            return self._grown.value, self._grown.std
        total = squares = torch.zeros((), dtype=torch.float64)
        block = buffer(self._spec, torch.device("cpu"))
        for start, stop in self._spec.blocks(BLOCK_ELEMENTS):
            rows = matrix(block, start, stop, self._spec.cols)
            self._source.read(start, stop, rows)
            total, squares = total + rows.sum(dtype=torch.float64), squares + rows.double().square().sum()
        mean = float(total) / self._spec.numel
        return mean, max(0.0, float(squares) / self._spec.numel - mean * mean) ** 0.5


def runs(index: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of ranges that are all new, or consecutive in the source."""
    if not len(index):
        return
    added = index == NEW
    breaks = np.flatnonzero((added[1:] != added[:-1]) | (~added[1:] & (index[1:] != index[:-1] + 1))) + 1
    ends = [0, *breaks.tolist(), len(index)]
    yield from ((a, b - a) for a, b in pairwise(ends))


def new_elements(
    model: PreTrainedModel, weights: GrownWeights, config: Mapping[str, object], names: Collection[str] | None = None
) -> dict[str, Tensor | None]:
    """Return the parameters that have added elements.

    Args:
        model: The grown model.
        weights: The grown weights on disk.
        config: The grown config.json.
        names: Tensors to look at; None for all.

    Returns:
        Parameter name -> bool tensor of its shape, true for added elements; None if all elements are added.
    """
    checked = weights.specs if names is None else names
    added = {name: mask for name in checked if (mask := weights.added(name)) is not None}
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor | None] = {}
    for live, runs in live_runs(config, weights.specs).items():
        if live not in parameters or not any(run.name in added for run in runs):
            continue
        rows = []
        for run in runs:
            spec = weights.specs[run.name]
            mask = added.get(run.name, np.zeros((spec.rows, spec.cols), bool))
            rows.append(mask[run.row : run.row + run.count])
        is_added = np.concatenate(rows)
        if is_added.any():
            parameter = parameters[live]
            masks[live] = None if is_added.all() else torch.from_numpy(is_added).reshape(parameter.shape).to(parameter.device)
    return masks
