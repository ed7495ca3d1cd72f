"""Inputs of a merge for one tensor: the base, the bricks' deltas and the values of the step's fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from workbench.lazy import torch
from workbench.merge.streaming.deltas import Deltas, DeltaSource
from workbench.merge.streaming.readers import Operand, RowReader
from workbench.models.layout import Model
from workbench.steps import Block, Memo, MergeMethod
from workbench.steps.fields import value_at
from workbench.weights.lowrank import Factors
from workbench.weights.sparse import Rows
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

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
    notes: dict[str, Any] = field(default_factory=dict)
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
    def deltas(self) -> list[DeltaSource | None]:
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
        return model or UpdatedSource(
            self.model.weights.open(self.tensor, self.device), brick.open_delta(self.tensor, self.device), self
        )

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


class UpdatedSource:
    """The tensor of a brick that stores an update: base plus delta."""

    def __init__(self, base: Source, delta: DeltaSource, group: TensorGroup) -> None:
        self._base, self._delta, self._cols = base, delta, group.spec.cols
        self._scratch = buffer(group.spec, group.device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32."""
        update = matrix(self._scratch, start, stop, self._cols)
        self._base.read(start, stop, out)
        self._delta.read_delta(start, stop, out, update)
        out.add_(update)
