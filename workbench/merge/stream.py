"""Runs a merge method over lazy weights: opens a tensor's inputs, reads them block by block, adds the delta."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from workbench.fields import value_at
from workbench.layout import Model
from workbench.merge.combination import CombinedSource, Operand
from workbench.merge.core import core_group, core_update, whole_tensors
from workbench.merge.selection import RowReader, SelectionSource
from workbench.registry import Block, Combination, Group, Memo, MergeMethod
from workbench.weights.lowrank import Factors, LowRankSum, summed
from workbench.weights.sparse import Rows, Selection
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements, buffer, matrix

T = TypeVar("T")


class DeltaSource(Protocol):
    """One tensor's delta, readable in row blocks."""

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with the delta of rows start..stop; `base` holds the base's same rows."""


class Deltas(Protocol):
    """A brick as a merge sees it: fine-tuned minus base."""

    def touches(self, name: str) -> bool:
        """Whether the brick may differ from the base at this tensor of the base."""

    def open_delta(self, name: str, device: torch.device) -> DeltaSource:
        """Prepare the delta of one tensor that the brick touches."""

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """The delta of one tensor as a low-rank product, exactly; None where it is not one."""

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """The fine-tuned tensor itself, where the brick holds it; None where it holds an update."""


class MergedWeights:
    """current + (method(base, bricks) − base), lazily.

    Args:
        current: What the steps before have made of the base.
        base: What deltas refer to.
        method: The step.
        bricks: The step's bricks.
        keys: Sort keys of the bricks. Where the method does not mind, bricks are taken in the order of their keys, so
            that the sums' last bits depend neither on their names nor on how the recipe lists them.
        seed: The recipe's, for methods that draw random numbers.
        measured: What the method's `measure` found, where it needs more than tensors.
        memo: What compositions before this one have found of the same bricks.
        contents: Gives the digest of each brick's content, for random masks and the memo; called when a method first asks, because
            it may read whole bricks. Omitted: `keys`, else the names.

    Attributes:
        notes: What the method has noted of the tensors computed so far.
    """

    def __init__(
        self,
        current: Model,
        base: Model,
        method: MergeMethod,
        bricks: Mapping[str, Deltas],
        keys: Mapping[str, str] | None = None,
        seed: int = 0,
        measured: Any = None,
        memo: Memo | None = None,
        contents: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self._current = current
        self._base = base
        self._method = method
        self._seed = seed
        self._memo = memo
        self._contents = contents or (lambda: {name: (keys or {}).get(name, name) for name in bricks})
        self._content_lock = threading.Lock()
        order = (
            sorted(bricks, key=lambda name: ((keys or {}).get(name, name), name)) if method.laws.permutation_invariant else bricks
        )
        self._bricks = {name: bricks[name] for name in order}
        self._lock = threading.Lock()
        self._surveyed: list[Any] = [] if measured is None else [measured]
        self.notes: dict[str, Any] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As before: a merge changes no shape."""
        return self._current.weights.specs

    def origin(self, name: str) -> str | None:
        """As before."""
        return self._current.weights.origin(name)

    @cached_property
    def merged(self) -> list[str]:
        """Tensors, by their current names, that the step may change."""
        return [name for name, spec in self.specs.items() if spec.is_float and self._reaches(name)]

    def _reaches(self, name: str) -> bool:
        origin = self.origin(name)
        where = self._method.where
        if origin is None or (where is not None and not where.matches(origin, self._base)):
            return False
        return self._method.moves_base() or any(brick.touches(origin) for brick in self._bricks.values())

    @cached_property
    def _merged_set(self) -> frozenset[str]:
        return frozenset(self.merged)

    def open(self, name: str, device: torch.device) -> Source:
        """The current tensor where no brick reaches; else prepare the method, which may read the tensor's deltas."""
        if name not in self._merged_set:
            return self._current.weights.open(name, device)
        group = self.group(name, device)
        group.survey = self._survey(device)
        if (update := core_update(self._method, group)) is not None:
            return LowRankSum(self._current.weights, {name: update}).open(name, device)
        prepared = self._method.prepare(group)
        current = None if self._is_first else self._current.weights.open(name, device)
        if isinstance(prepared, Combination):
            return CombinedSource(group, prepared, current)
        if isinstance(prepared, Selection):
            return SelectionSource(group, prepared, current)
        return _MergedSource(group, prepared, current)

    @property
    def current(self) -> Weights:
        """The weights before this step."""
        return self._current.weights

    def update(self, name: str, device: torch.device) -> Factors | None:
        """What the step adds to a tensor as a product of two factors, exactly; None where it is not one.

        It is one for adapters merged by a method that is linear in them, or in the core space; of rank 0 where no brick reaches.
        """
        if name not in self._merged_set:
            return Factors.zero(self.specs[name], device)
        group = self.group(name, device)
        group.survey = self._survey(device)
        if (update := core_update(self._method, group)) is not None:
            return update
        factors = [f for f in group.factors() if f is not None]
        prepared = self._method.prepare(group) if len(factors) == len(group.bricks) else None
        if not isinstance(prepared, Combination) or prepared.base:
            return None
        return summed(list(zip(prepared.weights, factors, strict=True)))

    def whole(self, device: torch.device) -> list[str]:
        """Tensors that a step with `space: core` merges whole, for its record."""
        return whole_tensors(self._method, (self.group(name, device) for name in self.merged))

    @property
    def _is_first(self) -> bool:
        return self._current.weights is self._base.weights

    def group(self, name: str, device: torch.device) -> TensorGroup:
        """One tensor's inputs, opened."""
        origin = self.origin(name)
        assert origin is not None
        spec = self.specs[name]
        return TensorGroup(
            origin,
            spec,
            self._bricks,
            self._brick_digests,
            self._method,
            self._base,
            device,
            self._seed,
            notes=self.notes,
            memo=self._memo,
        )

    def _brick_digests(self) -> list[str]:
        with self._content_lock:
            found = self._contents()
        return [found[name] for name in self._bricks]

    def _survey(self, device: torch.device) -> Any:
        if not self._surveyed and type(self._method).survey is MergeMethod.survey:
            return None
        with self._lock:
            if not self._surveyed:
                self._surveyed.append(self._method.survey(_Groups(self, device)))
            return self._surveyed[0]


@dataclass(frozen=True)
class _Groups:
    """The tensors of a step, opened anew, with their buffers, at every iteration."""

    weights: MergedWeights
    device: torch.device

    def __iter__(self) -> Iterator[Group]:
        for name in self.weights.merged:
            group = self.weights.group(name, self.device)
            yield core_group(self.weights._method, group) or group


class Once(Generic[T]):
    """`functools.cached_property` without its lock.

    Python 3.11 shares that lock among all instances, so that two threads which open tensors of a recipe inside a recipe would
    each wait for the other. A group belongs to one thread.
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
    """One tensor: its base, every brick's delta and the values of the step's fields. Implements `registry.Group`."""

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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.spec.shape

    @property
    def bricks(self) -> list[str]:
        """Names of the bricks, in the step's order."""
        return list(self.sources)

    @Once
    def keys(self) -> list[str]:
        """Digest of each brick's content; the first call of a run may read whole bricks."""
        return self.digests()

    @Once
    def base(self) -> Source:
        """The base's tensor, opened when it is asked for: a mean of models does not read it."""
        return self.model.weights.open(self.tensor, self.device)

    @Once
    def deltas(self) -> list[DeltaSource | None]:
        """One open delta a brick; None where it does not touch the tensor."""
        return [
            brick.open_delta(self.tensor, self.device) if brick.touches(self.tensor) else None for brick in self.sources.values()
        ]

    def value(self, field: str) -> float:
        """The step's field at this tensor; a list of rules without a match gives the field's default."""
        default = type(self.method).model_fields[field].default
        return value_at(getattr(self.method, field), self.tensor, self.model, default)

    def values(self, field: str) -> list[float]:
        """A per-brick field at this tensor; the step's where a brick says nothing, the entry's default where there is none."""
        entries = [self.method.entry(brick) for brick in self.bricks]
        shared = field in type(self.method).model_fields
        own = self.value(field) if shared else type(entries[0]).model_fields[field].default
        given = [getattr(entry, field) for entry in entries]
        return [own if g is None else value_at(g, self.tensor, self.model, own) for g in given]

    def factors(self) -> list[Factors | None]:
        """Every brick's low-rank update; one of rank 0 where the brick does not touch the tensor."""
        none = Factors.zero(self.spec, self.device)
        return [b.factors(self.tensor, self.device) if b.touches(self.tensor) else none for b in self.sources.values()]

    @Once
    def _buffers(self) -> list[Tensor]:
        return [buffer(self.spec, self.device) for _ in range(len(self.deltas) + 1)]

    def block(self, start: int, stop: int) -> Block:
        """Read rows start..stop; the next call overwrites them."""
        base, *deltas = (matrix(flat, start, stop, self.spec.cols) for flat in self._buffers)
        return self._fill(start, stop, base, deltas)

    def _fill(self, start: int, stop: int, base: Tensor, deltas: list[Tensor]) -> Block:
        self.base.read(start, stop, base)
        for source, delta in zip(self.deltas, deltas, strict=True):
            if source is None:
                delta.zero_()
            else:
                source.read_delta(start, stop, base, delta)
        return Block(base, deltas, start)

    def models(self) -> Iterator[list[Tensor]]:
        """Every brick's θ, block by block."""
        opened = [Operand(self._open_model(brick), self.spec, self.device) for brick in self.sources.values()]
        for start, stop in self.spec.blocks(block_elements(self.device)):
            yield [model.rows(start, stop) for model in opened]

    def _open_model(self, brick: Deltas) -> Source:
        if not brick.touches(self.tensor):
            return self.model.weights.open(self.tensor, self.device)
        found = brick.open_model(self.tensor, self.device)
        return found or UpdatedSource(
            self.model.weights.open(self.tensor, self.device), brick.open_delta(self.tensor, self.device), self
        )

    def whole(self) -> Block:
        """The tensor as one block, in memory of its own."""
        rows, cols = self.spec.rows, self.spec.cols
        base, *deltas = (torch.empty(rows, cols, device=self.device) for _ in range(len(self.deltas) + 1))
        for start, stop in self.spec.blocks(block_elements(self.device)):
            self._fill(start, stop, base[start:stop], [delta[start:stop] for delta in deltas])
        return Block(base, deltas, 0)

    @Once
    def _reader(self) -> RowReader:
        # Not the group itself, which holds the reader: buffers in a cycle wait for the collector.
        return RowReader(self.tensor, self.spec, self.base, self.sources.values(), self.device)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop as they lie, unchecked; the next call overwrites them."""
        return self._reader.read(start, stop)

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise for the first NaN or infinity in rows start..stop, if there is one."""
        self._reader.refuse_non_finite(start, stop)

    def blocks(self) -> Iterator[Block]:
        """Read the tensor from its start."""
        for start, stop in self.spec.blocks(block_elements(self.device)):
            yield self.block(start, stop)


class _MergedSource:
    def __init__(self, group: TensorGroup, prepared: Callable[[Block], Tensor], current: Source | None) -> None:
        self._group = group
        self._delta = prepared
        self._current = current  # None: the current tensor is the base's, which the block holds already

    def read(self, start: int, stop: int, out: Tensor) -> None:
        block = self._group.block(start, stop)
        if self._current is None:
            torch.add(block.base, self._delta(block), out=out)
        else:
            self._current.read(start, stop, out)
            out.add_(self._delta(block))


class UpdatedSource:
    """A brick's own tensor where it holds an update: base plus delta."""

    def __init__(self, base: Source, delta: DeltaSource, group: TensorGroup) -> None:
        self._base, self._delta, self._cols = base, delta, group.spec.cols
        self._scratch = buffer(group.spec, group.device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Rows start..stop in float32."""
        update = matrix(self._scratch, start, stop, self._cols)
        self._base.read(start, stop, out)
        self._delta.read_delta(start, stop, out, update)
        out.add_(update)
