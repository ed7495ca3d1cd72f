"""Weights that apply a merge method lazily: each tensor's inputs are read block by block when the tensor is read.

Core Space (Panariello et al. 2025, arXiv 2509.17786) expresses the adapters' deltas as small matrices in a common basis. Let U [rows, p] be
the singular basis of all left factors concatenated by columns, and V [q, cols] that of all right factors concatenated by rows. Then brick
i's delta is exactly U MᵢV with Mᵢ = (UᵀLᵢ)(RᵢVᵀ) [p, q], where p and q are at most the sum of the ranks. A method merges the Mᵢ into M, and
the tensor's update is U M V, which is still a product of two factors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from workbench.ground.lazy import torch
from workbench.merge.streaming.deltas import StepBricks
from workbench.merge.streaming.group import CombinedSource, SelectionSource, TensorGroup, selected
from workbench.models.layout import Model
from workbench.steps import Block, Combination, Group, Memo, MergeMethod
from workbench.weights.lowrank import Factors, LowRankSum, summed
from workbench.weights.sparse import Rows, Selection
from workbench.weights.specs import Source, TensorSpec, Weights, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.merge.measuring.matrices import Overlap
    from workbench.weights.masks import TensorMask


# Singular values of the stacked factors below this share of the largest are float64 rounding errors.
_RESOLUTION = 1e-12


@dataclass
class CoreGroup(TensorGroup):
    """One tensor in the core space.

    The base of its blocks is empty. The base is not in the adapters' span, so a method that reads it cannot declare "core".
    """

    left: Tensor = field(kw_only=True)
    """U [rows, p], float64."""
    right: Tensor = field(kw_only=True)
    """V [q, cols], float64."""
    cores: list[Tensor] = field(kw_only=True)
    """Mᵢ [p, q], float32, one per brick."""
    whole_shape: tuple[int, ...] = field(kw_only=True)
    """Shape of the tensor, not of its core matrices."""

    @classmethod
    def in_basis(cls, group: TensorGroup, left: Tensor, right: Tensor, cores: list[Tensor]) -> CoreGroup:
        """Return a tensor in a basis. Its spec is that of the core matrices, its shape stays that of the tensor."""
        given = {f.name: getattr(group, f.name) for f in fields(TensorGroup)}
        # The basis depends on all bricks: nothing can be reused for other sets of bricks.
        given |= {"spec": TensorSpec((left.shape[1], right.shape[0]), "F32"), "memo": None}
        return cls(**given, left=left, right=right, cores=cores, whole_shape=group.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, not of its core matrices."""
        return self.whole_shape

    def models(self) -> Iterator[list[Tensor]]:
        """Refuse: a model is not in the adapters' span."""
        raise NotImplementedError("a method that reads models cannot declare the core space")

    def rows(self, start: int, stop: int) -> Rows:
        """Return rows start..stop of the core matrices."""
        return Rows(None, [core[start:stop] for core in self.cores], [True] * len(self.cores))

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Do nothing: factors are checked when they are read."""

    def blocks(self) -> Iterator[Block]:
        """Yield one block: core matrices are small."""
        yield self.whole()

    def whole(self) -> Block:
        """Return a block with copies of the core matrices."""
        return Block(torch.empty(0, device=self.device), [core.clone() for core in self.cores], 0)

    def factors(self) -> list[Factors | None]:
        """Return None for each brick: a core matrix is not stored as factors."""
        return [None] * len(self.cores)

    def outside(self, core: Tensor) -> Factors:
        """Return the tensor's update U M V for a core matrix M [p, q]; its rank is min(p, q)."""
        if core.shape[0] <= core.shape[1]:
            return Factors(self.left.float(), (core.double() @ self.right).float())
        return Factors((self.left @ core.double()).float(), self.right.float())


def takes_core(method: MergeMethod, group: Group) -> bool:
    """Return whether a step merges a tensor of this shape in the core space.

    It does if the recipe asks for it, or if the result is the same and takes less work.
    """
    is_equivalent = method.laws.rotation_invariant and method.laws.memory == "tensor"
    return len(group.shape) == 2 and (method.in_core_space() or is_equivalent)


def core_group(method: MergeMethod, group: TensorGroup) -> CoreGroup | None:
    """Return a tensor in the core space, or None if the step merges it whole.

    It does so if `takes_core` is false, or if a brick's delta is no low-rank product.
    """
    if not takes_core(method, group):
        return None
    memo_key = ("core", group.tensor, *group.keys) if group.memo is not None else ()
    if group.memo is not None and (stored := group.memo.get(memo_key)):
        return CoreGroup.in_basis(group, *stored)
    by_brick = group.factors()
    factors = [f for f in by_brick if f is not None]
    if len(factors) < len(by_brick):
        return None
    left = _basis(torch.cat([f.left for f in factors], 1).double())
    right = _basis(torch.cat([f.right for f in factors], 0).double().T).T
    cores = [((left.T @ f.left.double()) @ (f.right.double() @ right.T)).float() for f in factors]
    if group.memo is not None:
        group.memo.store(memo_key, (left, right, cores))
    return CoreGroup.in_basis(group, left, right, cores)


def core_update(method: MergeMethod, group: TensorGroup) -> Factors | None:
    """Return the update of a tensor that the step merges in the core space, or None if the step merges it whole."""
    core = core_group(method, group)
    if core is None:
        return None
    if not core.spec.numel:  # every factor is zero
        return Factors(core.left[:, :0].float(), core.right[:0].float())
    prepared = method.prepare(core)
    if isinstance(prepared, Combination):
        assert prepared.base == 0, f"{method.name} declares the core space but reads the base"
        merged = torch.zeros_like(core.cores[0], dtype=torch.float64)
        for matrix, weight in zip(core.cores, prepared.weights, strict=True):
            merged.add_(matrix.double(), alpha=weight)
        return core.outside(merged)
    block = core.whole()
    return core.outside(selected(prepared, block.deltas) if isinstance(prepared, Selection) else prepared(block))


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [size, p] of the span of columns [size, count]: their left singular vectors, as in the paper.

    The result of element-wise methods depends on the basis. This basis does not depend on the order of the columns.
    """
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = q @ u[:, values > _RESOLUTION * values[:1]]
    return basis


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
        method: The step.
        bricks: The step's bricks, in the order in which they are read.
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
        self.method = method
        self._seed = seed
        self._memo = memo
        self._masks = bricks.masks
        self._contents = bricks.contents
        self._content_lock = threading.Lock()
        self.bricks = bricks.in_order(by_key=method.laws.permutation_invariant)
        self._lock = threading.Lock()
        self._overlap: Overlap | None = None
        self._overlap_lock = threading.Lock()
        self._surveyed: list[Any] = [] if measured is None else [measured]
        self.notes: dict[str, Mapping[str, float]] = {}

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
        where, every, bricks = self.method.where, self.method.moves_base(), self.bricks.values()
        return [
            name
            for name, spec in self.specs.items()
            if spec.is_float
            and (origin := self.origin(name)) is not None
            and (where is None or where.matches(origin, self._base))
            and (every or any(brick.touches(origin) for brick in bricks))
        ]

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
        prepared = self.method.prepare(group)
        is_first = self._current.weights is self._base.weights
        current = None if is_first else self._current.weights.open(name, device)
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
        prepared = self.method.prepare(group) if len(factors) == len(group.bricks) else None
        if not isinstance(prepared, Combination) or prepared.base:
            return None
        return summed(list(zip(prepared.weights, factors, strict=True)))

    def whole(self, device: torch.device) -> list[str]:
        """Return the tensors that a step with `space: core` merges whole: vectors, fused experts, and deltas that are no low-rank product."""
        if not self.method.in_core_space():
            return []
        groups = (self.group(name, device) for name in self.merged)
        return [g.tensor for g in groups if not takes_core(self.method, g) or None in g.factors()]

    def _mask(self, group: TensorGroup) -> TensorMask | None:
        mask = self._masks.get(group.tensor)
        return mask.to(group.device) if mask else None

    def _core_update(self, group: TensorGroup, mask: TensorMask | None) -> Factors | None:
        update = core_update(self.method, group)
        return mask.factors(update) if mask and update is not None else update

    def overlap(self, device: torch.device) -> Overlap | None:
        """Return the overlap of the bricks on the step's tensors, measured once; None if the step does not weigh by it."""
        if not self.method.weighs_overlap():
            return None
        from workbench.merge.measuring.matrices import overlap

        with self._overlap_lock:
            if self._overlap is None:
                # A memo has it if an earlier composition has measured the same tensors.
                key = ("overlap", *self._brick_digests(), *self.merged) if self._memo is not None else ()
                self._overlap = self._memo.get(key) if self._memo is not None else None
                if self._overlap is None:
                    self._overlap = overlap((self._unweighed(name, device) for name in self.merged), list(self.bricks))
                if self._memo is not None:
                    self._memo.store(key, self._overlap)
            return self._overlap

    def group(self, name: str, device: torch.device) -> TensorGroup:
        """Return the inputs of one tensor."""
        group = self._unweighed(name, device)
        if (measured := self.overlap(device)) is not None:
            weights = measured.weights
            group.shares = [weights[brick] for brick in self.bricks]
        return group

    def _unweighed(self, name: str, device: torch.device) -> TensorGroup:
        """Return the inputs of one tensor with the weights of the recipe alone."""
        origin = self.origin(name)
        assert origin is not None
        spec = self.specs[name]
        return TensorGroup(
            origin,
            spec,
            self.bricks,
            self._brick_digests,
            self.method,
            self._base,
            device,
            self._seed,
            notes=self.notes,
            memo=self._memo,
        )

    def _brick_digests(self) -> list[str]:
        with self._content_lock:
            digests = self._contents()
        return [digests[name] for name in self.bricks]

    def _survey(self, device: torch.device) -> Any:
        """Return what the method measured on the whole model; it is computed once."""
        if not self._surveyed and type(self.method).survey is MergeMethod.survey:
            return None
        with self._lock:
            if not self._surveyed:
                self._surveyed.append(self.method.survey(_Groups(self, device)))
            return self._surveyed[0]


@dataclass(frozen=True)
class _Groups:
    """Iterable of the tensors of a step; each iteration opens them again and allocates new buffers."""

    weights: MergedWeights
    device: torch.device

    def __iter__(self) -> Iterator[Group]:
        for name in self.weights.merged:
            group = self.weights.group(name, self.device)
            yield core_group(self.weights.method, group) or group


@dataclass(eq=False)
class _MergedSource:
    group: TensorGroup
    prepared: Callable[[Block], Tensor]
    current: Source | None  # None: the current tensor is the base's, which the block already has

    def read(self, start: int, stop: int, out: Tensor) -> None:
        block = self.group.block(start, stop)
        if self.current is None:
            torch.add(block.base, self.prepared(block), out=out)
        else:
            self.current.read(start, stop, out)
            out.add_(self.prepared(block))


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
