"""Weights that apply a merge method lazily: each tensor's inputs are read block by block when the tensor is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch
from workbench.merge.measuring.matrices import Overlap, overlap
from workbench.merge.streaming.core import core_group, core_update, whole_tensors
from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.group import CombinedSource, SelectionSource, TensorGroup
from workbench.models.layout import Model
from workbench.steps import Block, Combination, Group, Memo, MergeMethod
from workbench.weights.lowrank import Factors, LowRankSum, summed
from workbench.weights.masks import TensorMask
from workbench.weights.sparse import Selection
from workbench.weights.specs import Source, TensorSpec, Weights, matrix

if TYPE_CHECKING:
    from torch import Tensor


class MergedWeights:
    """The weights current + (method(base, bricks) − base), computed lazily.

    Args:
        current: Model after the preceding steps.
        base: Model that deltas refer to.
        method: The step.
        bricks: The step's bricks.
        seed: The recipe's seed, for random methods.
        measured: Value from the method's `measure`, if it has one.
        memo: Values that earlier compositions computed from the same bricks.

    Attributes:
        notes: The method's notes on the tensors computed so far.
    """

    def __init__(
        self,
        current: Model,
        base: Model,
        method: MergeMethod,
        bricks: StepBricks,
        *,
        seed: int = 0,
        measured: Any = None,
        memo: Memo | None = None,
    ) -> None:
        self._current = current
        self._base = base
        self._method = method
        self._seed = seed
        self._memo = memo
        self._masks = bricks.masks
        self._contents = bricks.contents
        self._content_lock = threading.Lock()
        self._bricks = bricks.in_order(by_key=method.laws.permutation_invariant)
        self._lock = threading.Lock()
        self._overlap: Overlap | None = None
        self._overlap_lock = threading.Lock()
        self._surveyed: list[Any] = [] if measured is None else [measured]
        self.notes: dict[str, Any] = {}

    @property
    def method(self) -> MergeMethod:
        """The step."""
        return self._method

    @property
    def bricks(self) -> Collection[str]:
        """The step's bricks."""
        return self._bricks

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the current weights: a merge changes no shape."""
        return self._current.weights.specs

    def origin(self, name: str) -> str | None:
        """Return the base's tensor for a current tensor: a merge renames nothing."""
        return self._current.weights.origin(name)

    @cached_property
    def merged(self) -> list[str]:
        """Current names of the tensors that the step may change."""
        return [name for name, spec in self.specs.items() if spec.is_float and self._merges(name)]

    def _merges(self, name: str) -> bool:
        """Return whether the step may change a tensor."""
        origin = self.origin(name)
        where = self._method.where
        if origin is None or (where is not None and not where.matches(origin, self._base)):
            return False
        return self._method.moves_base() or any(brick.touches(origin) for brick in self._bricks.values())

    @cached_property
    def _merged_set(self) -> frozenset[str]:
        return frozenset(self.merged)

    def open(self, name: str, device: torch.device) -> Source:
        """Open the merged tensor, or the current one if the step does not change it.

        Opening prepares the method, which may read the tensor's deltas.
        """
        if name not in self._merged_set:
            return self._current.weights.open(name, device)
        group = self.group(name, device)
        group.survey = self._survey(device)
        mask = self._mask(group)
        if (update := self._core_update(group, mask)) is not None:
            return LowRankSum(self._current.weights, {name: update}).open(name, device)
        prepared = self._method.prepare(group)
        current = None if self._is_first else self._current.weights.open(name, device)
        if isinstance(prepared, Selection):
            return SelectionSource(group, prepared, current)  # element by element: zero deltas stay zero
        source: Source
        if isinstance(prepared, Combination):
            source = CombinedSource(group, prepared, current)
            mask = mask if prepared.base else None
        else:
            source = _MergedSource(group, prepared, current)
        return source if mask is None else _KeptOutside(source, self._current.weights.open(name, device), mask, group.spec)

    @property
    def current(self) -> Weights:
        """Weights before this step."""
        return self._current.weights

    def update(self, name: str, device: torch.device) -> Factors | None:
        """Return the update of a tensor as an exact product of two factors, or None if it is not one.

        The update is a product for adapters that are merged by a linear method or in the core space. It has rank 0 if the step
        does not change the tensor.
        """
        if name not in self._merged_set:
            return Factors.zero(self.specs[name], device)
        group = self.group(name, device)
        group.survey = self._survey(device)
        if (update := self._core_update(group, self._mask(group))) is not None:
            return update
        factors = [f for f in group.factors() if f is not None]
        prepared = self._method.prepare(group) if len(factors) == len(group.bricks) else None
        if not isinstance(prepared, Combination) or prepared.base:
            return None
        return summed(list(zip(prepared.weights, factors, strict=True)))

    def whole(self, device: torch.device) -> list[str]:
        """Return the tensors that a step with `space: core` merges whole, for the step's record."""
        return whole_tensors(self._method, (self.group(name, device) for name in self.merged))

    def _mask(self, group: TensorGroup) -> TensorMask | None:
        mask = self._masks.get(group.tensor)
        return mask.to(group.device) if mask else None

    def _core_update(self, group: TensorGroup, mask: TensorMask | None) -> Factors | None:
        update = core_update(self._method, group)
        return mask.factors(update) if mask and update is not None else update

    @property
    def _is_first(self) -> bool:
        return self._current.weights is self._base.weights

    def overlap(self, device: torch.device) -> Overlap | None:
        """Return the overlap of the bricks on the step's tensors, measured once; None if the step does not weigh by it."""
        if not self._method.weighs_overlap():
            return None
        with self._overlap_lock:
            if self._overlap is None:
                self._overlap = self._measured_overlap(device)
            return self._overlap

    def _measured_overlap(self, device: torch.device) -> Overlap:
        """Return the overlap of the bricks, from the memo if an earlier composition has measured the same tensors."""
        key = ("overlap", *self._brick_digests(), *self.merged) if self._memo is not None else ()
        if self._memo is not None and (known := self._memo.get(key)) is not None:
            stored: Overlap = known
            return stored
        measured = overlap((self._unweighed(name, device) for name in self.merged), list(self._bricks))
        if self._memo is not None:
            self._memo.keep(key, measured)
        return measured

    def group(self, name: str, device: torch.device) -> TensorGroup:
        """Return the inputs of one tensor."""
        group = self._unweighed(name, device)
        if (measured := self.overlap(device)) is not None:
            weights = measured.weights
            group.shares = [weights[brick] for brick in self._bricks]
        return group

    def _unweighed(self, name: str, device: torch.device) -> TensorGroup:
        """Return the inputs of one tensor with the weights of the recipe alone."""
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
            digests = self._contents()
        return [digests[name] for name in self._bricks]

    def _survey(self, device: torch.device) -> Any:
        """Return what the method measured on the whole model; it is computed once."""
        if not self._surveyed and type(self._method).survey is MergeMethod.survey:
            return None
        with self._lock:
            if not self._surveyed:
                self._surveyed.append(self._method.survey(_Groups(self, device)))
            return self._surveyed[0]


@dataclass(frozen=True)
class _Groups:
    """Iterable of the tensors of a step; each iteration opens them again and allocates new buffers."""

    weights: MergedWeights
    device: torch.device

    def __iter__(self) -> Iterator[Group]:
        for name in self.weights.merged:
            group = self.weights.group(name, self.device)
            yield core_group(self.weights._method, group) or group


class _MergedSource:
    def __init__(self, group: TensorGroup, prepared: Callable[[Block], Tensor], current: Source | None) -> None:
        self._group = group
        self._delta = prepared
        self._current = current  # None: the current tensor is the base's, which the block already has

    def read(self, start: int, stop: int, out: Tensor) -> None:
        block = self._group.block(start, stop)
        if self._current is None:
            torch.add(block.base, self._delta(block), out=out)
        else:
            self._current.read(start, stop, out)
            out.add_(self._delta(block))


class _KeptOutside:
    """A merged tensor with the current values outside a mask, for methods that spread a delta over its tensor or scale the base."""

    def __init__(self, merged: Source, current: Source, mask: TensorMask, spec: TensorSpec) -> None:
        self._merged, self._current, self._mask = merged, current, mask
        self._scratch, self._cols = torch.empty(0, device=mask.chosen.device), spec.cols

    def read(self, start: int, stop: int, out: Tensor) -> None:
        if len(self._scratch) < out.numel():
            self._scratch = torch.empty(out.numel(), device=out.device)
        before = matrix(self._scratch, start, stop, self._cols)
        self._merged.read(start, stop, out)
        self._current.read(start, stop, before)
        self._mask.put(start, stop, before, out)
