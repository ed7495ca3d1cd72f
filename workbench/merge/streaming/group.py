"""One tensor of a merge: the base, the bricks' deltas, the values of the step's fields, and the sources that compute it in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from workbench.ground.lazy import torch
from workbench.merge.streaming.deltas import Deltas
from workbench.models.layout import Model
from workbench.steps import Block, Combination, Memo, MergeMethod
from workbench.steps.fields import value_at
from workbench.weights import kernels
from workbench.weights.lowrank import Factors, summed
from workbench.weights.sparse import Rows, Selection, Trim, select
from workbench.weights.specs import Source, StoredSource, TensorSpec, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.adapters.dense import DeltaRows
    from workbench.merge.streaming.deltas import Deltas


class Operand:
    """Row blocks of one model's tensor, in the stored dtype if it is in a file, or in float32 if it is computed."""

    def __init__(self, source: Source, spec: TensorSpec, device: torch.device) -> None:
        self._source = source
        self._stored = source if isinstance(source, StoredSource) else None
        self._cols = spec.cols
        self._computed = buffer(spec, device) if self._stored is None else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop; stored rows are not checked for NaN and infinity."""
        if self._computed is None:
            assert self._stored is not None
            return self._stored.raw(start, stop)
        block = matrix(self._computed, start, stop, self._cols)
        self._source.read(start, stop, block)
        return block

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise an error that names the first NaN or infinity of a stored tensor in rows start..stop."""
        if self._stored is not None:
            self._stored.refuse_non_finite(start, stop)


class RowReader:
    """Reader of a tensor's base and bricks: a model's stored rows if it has them, otherwise its delta in float32."""

    def __init__(self, tensor: str, spec: TensorSpec, base: Source, bricks: Iterable[Deltas], device: torch.device) -> None:
        self._cols = spec.cols
        self._base = Operand(base, spec, device)
        self._bricks: list[Operand | tuple[DeltaRows, Tensor] | None] = []
        for brick in bricks:
            if not brick.touches(tensor):
                self._bricks.append(None)
            elif model := brick.open_model(tensor, device):
                self._bricks.append(Operand(model, spec, device))
            else:
                self._bricks.append((brick.open_delta(tensor, device), buffer(spec, device)))
        self._wide = buffer(spec, device) if any(isinstance(b, tuple) for b in self._bricks) else None

    def read(self, start: int, stop: int) -> Rows:
        """Return rows start..stop in buffers that the next call overwrites."""
        cols = self._cols
        base = self._base.rows(start, stop)
        if self._wide is not None:
            base = matrix(self._wide, start, stop, cols).copy_(base)
        bricks: list[Tensor | None] = []
        for brick in self._bricks:
            if isinstance(brick, tuple):
                source, buffer = brick
                delta = matrix(buffer, start, stop, cols)
                source.read_delta(start, stop, base, delta)
                bricks.append(delta)
            else:
                bricks.append(brick.rows(start, stop) if brick else None)
        return Rows(base, bricks, [isinstance(brick, tuple) for brick in self._bricks])

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise an error that names the first NaN or infinity of a stored tensor in rows start..stop."""
        for operand in (self._base, *self._bricks):
            if isinstance(operand, Operand):
                operand.refuse_non_finite(start, stop)


T = TypeVar("T")


class Once(Generic[T]):
    """A `functools.cached_property` without a lock.

    Python 3.11 shares that lock among all instances. Two threads that open tensors of a recipe inside a recipe would then wait
    for each other. A group belongs to one thread, and needs no lock.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, _owner: type | None = None) -> T:
        value = instance.__dict__[self._name] = self._make(instance)
        return value


@dataclass
class TensorGroup:
    """One tensor: its base, every brick's delta and the values of the step's fields. Implements the protocol `Group`."""

    tensor: str
    spec: TensorSpec
    sources: Mapping[str, Deltas]
    digests: Callable[[], list[str]]
    method: MergeMethod
    model: Model
    device: torch.device
    seed: int
    survey: Any = None
    notes: dict[str, Mapping[str, float]] = field(default_factory=dict)
    memo: Memo | None = None
    shares: Sequence[float] | None = None
    """Factor of each brick's weight that follows from the bricks' overlap."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.spec.shape

    @property
    def bricks(self) -> list[str]:
        """Names of the bricks, in the step's order."""
        return list(self.sources)

    @Once
    def keys(self) -> list[str]:
        """Return the digest of each brick's content; the first call of a run may read whole bricks."""
        return self.digests()

    @Once
    def base(self) -> Source:
        """Open the base's tensor. This is lazy, because a mean of models does not read the base."""
        return self.model.weights.open(self.tensor, self.device)

    @Once
    def deltas(self) -> list[DeltaRows | None]:
        """Open each brick's delta; None for a brick that does not touch the tensor."""
        return [
            brick.open_delta(self.tensor, self.device) if brick.touches(self.tensor) else None for brick in self.sources.values()
        ]

    def value(self, field: str) -> float:
        """Return the value of a step's field at this tensor; if no rule of a schedule matches, the field's default."""
        default = type(self.method).model_fields[field].default
        return value_at(getattr(self.method, field), self.tensor, self.model, default)

    def values(self, field: str) -> list[float]:
        """Return the values of a per-brick field at this tensor, one per brick.

        A brick without a value gets that of the step's field of the same name or, if there is none, the default of the brick's
        field.
        """
        entries = [self.method.entry(brick) for brick in self.bricks]
        shared = field in type(self.method).model_fields
        fallback = self.value(field) if shared else type(entries[0]).model_fields[field].default
        own_values = [getattr(entry, field) for entry in entries]
        values = [fallback if g is None else value_at(g, self.tensor, self.model, fallback) for g in own_values]
        if field == "weight" and self.shares is not None:
            return [share * value for share, value in zip(self.shares, values, strict=True)]
        return values

    def factors(self) -> list[Factors | None]:
        """Return every brick's low-rank update, or None if it has none; of rank 0 if the brick does not touch the tensor."""
        none = Factors.zero(self.spec, self.device)
        return [b.factors(self.tensor, self.device) if b.touches(self.tensor) else none for b in self.sources.values()]

    @Once
    def _buffers(self) -> list[Tensor]:
        return [buffer(self.spec, self.device) for _ in range(len(self.deltas) + 1)]

    def block(self, start: int, stop: int) -> Block:
        """Read rows start..stop into buffers that the next call overwrites."""
        base, *deltas = (matrix(flat, start, stop, self.spec.cols) for flat in self._buffers)
        return self._fill(start, stop, base, deltas)

    def _fill(self, start: int, stop: int, base: Tensor, deltas: list[Tensor]) -> Block:
        """Read rows of the base and of all deltas into buffers."""
        self.base.read(start, stop, base)
        for source, delta in zip(self.deltas, deltas, strict=True):
            if source is None:
                delta.zero_()
            else:
                source.read_delta(start, stop, base, delta)
        return Block(base, deltas, start)

    def models(self) -> Iterator[list[Tensor]]:
        """Yield every brick's θ block by block."""
        opened = [Operand(self._open_model(brick), self.spec, self.device) for brick in self.sources.values()]
        for start, stop in self.spec.blocks(block_elements(self.device)):
            yield [model.rows(start, stop) for model in opened]

    def _open_model(self, brick: Deltas) -> Source:
        """Open a brick's own tensor: the base's if the brick does not change it, else the stored one or base plus delta."""
        if not brick.touches(self.tensor):
            return self.model.weights.open(self.tensor, self.device)
        model = brick.open_model(self.tensor, self.device)
        if model is not None:
            return model
        from workbench.adapters.dense import UpdatedSource

        base = self.model.weights.open(self.tensor, self.device)
        return UpdatedSource(base, brick.open_delta(self.tensor, self.device), self.spec, self.device)

    def whole(self) -> Block:
        """Return the tensor as one block, in newly allocated memory."""
        rows, cols = self.spec.rows, self.spec.cols
        base, *deltas = (torch.empty(rows, cols, device=self.device) for _ in range(len(self.deltas) + 1))
        for start, stop in self.spec.blocks(block_elements(self.device)):
            self._fill(start, stop, base[start:stop], [delta[start:stop] for delta in deltas])
        return Block(base, deltas, 0)

    @Once
    def _reader(self) -> RowReader:
        # The reader must not refer to the group: a cycle would keep the buffers until garbage collection.
        return RowReader(self.tensor, self.spec, self.base, self.sources.values(), self.device)

    def rows(self, start: int, stop: int) -> Rows:
        """Return rows start..stop as stored, unchecked; the next call overwrites them."""
        return self._reader.read(start, stop)

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise an error that names the first NaN or infinity in rows start..stop, if there is one."""
        self._reader.refuse_non_finite(start, stop)

    def blocks(self) -> Iterator[Block]:
        """Yield the tensor from its start, block by block."""
        for start, stop in self.spec.blocks(block_elements(self.device)):
            yield self.block(start, stop)


class CombinedSource:
    """One tensor of θ₀ + Σ wᵢτᵢ + base·θ₀, or of the same delta on other weights.

    If the sum does not depend on θ₀ (means of checkpoints), the base is not read, and the first model takes its place.

    Args:
        group: The tensor's inputs.
        combination: Weights of the deltas and of the base.
        current: Weights that the delta is added to; None for the base's.
    """

    def __init__(self, group: TensorGroup, combination: Combination, current: Source | None) -> None:
        self._group, self._current = group, current
        self._models: list[tuple[Operand, float]] = []
        self._deltas: list[tuple[DeltaRows, float]] = []
        low: list[tuple[float, Factors]] = []
        for brick, weight in zip(group.sources.values(), combination.weights, strict=True):
            if not brick.touches(group.tensor):
                continue
            if source := brick.open_model(group.tensor, group.device):
                self._models.append((Operand(source, group.spec, group.device), weight))
            elif factors := brick.factors(group.tensor, group.device):
                low.append((weight, factors))
            else:
                self._deltas.append((brick.open_delta(group.tensor, group.device), weight))
        self._low = summed(low) if low else None
        # out = scale · anchor + Σ w (model − anchor). The anchor is the base, or the first model if θ₀ cancels out.
        weights = [weight for _, weight in self._models]
        base_weight = 1 + combination.base - sum(weights)
        if self._current is None and self._models and not self._deltas and abs(base_weight) < 1e-9:
            self._anchor, self._others = self._models[0][0], self._models[1:]
            self._scale = 1.0 if abs(combination.base) < 1e-9 else sum(weights)
        else:
            self._anchor, self._others = Operand(self._group.base, self._group.spec, self._group.device), self._models
            self._scale = combination.base + (1.0 if self._current is None else 0.0)
        self._scratch = buffer(group.spec, group.device) if current or self._deltas else None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32."""
        anchor = self._anchor.rows(start, stop)
        others = [model.rows(start, stop) for model, _ in self._others]
        if not kernels.combine(anchor, self._scale, others, [weight for _, weight in self._others], out):
            for model in (self._anchor, *(model for model, _ in self._others)):
                model.refuse_non_finite(start, stop)
        if self._low is not None:
            kernels.multiply(self._low.left[start:stop], self._low.right, out, add=True)
        if self._scratch is None:
            return
        scratch = matrix(self._scratch, start, stop, self._group.spec.cols)
        for delta, weight in self._deltas:
            delta.read_delta(start, stop, anchor.float(), scratch)
            out.add_(scratch.mul_(weight))
        if self._current is not None:
            self._current.read(start, stop, scratch)
            out.add_(scratch)


class SelectionSource:
    """One tensor of θ₀ + selection, or of the selection on other weights. Must be read in order, from the start."""

    def __init__(self, group: TensorGroup, selection: Selection, current: Source | None) -> None:
        self._group, self._selection, self._current = group, selection, current
        self._left: list[int] = []
        self._scratch = buffer(group.spec, group.device) if current else None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32."""
        if start == 0:
            self._left = ties_of(self._selection)
        index = start * self._group.spec.cols
        rows = self._group.rows(start, stop)
        if not select(rows, self._selection, self._left, index, self._current is None, out):
            self._group.refuse_non_finite(start, stop)
        if self._current is not None and self._scratch is not None:
            scratch = matrix(self._scratch, start, stop, self._group.spec.cols)
            self._current.read(start, stop, scratch)
            out.add_(scratch)


def ties_of(selection: Selection) -> list[int]:
    """Return the number of ties of every trim, before the first block."""
    return [thin.ties if isinstance(thin, Trim) else 0 for thin in selection.thin]


def selected(selection: Selection, deltas: list[Tensor]) -> Tensor:
    """Apply a selection to whole deltas in memory [rows, cols], in float32."""
    out = torch.empty_like(deltas[0])
    select(Rows(None, list(deltas), [True] * len(deltas)), selection, ties_of(selection), 0, False, out)
    return out
