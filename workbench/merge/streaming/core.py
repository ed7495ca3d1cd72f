"""Core Space: merge the small matrices that adapters' deltas are in a common basis, and map the result back.

Panariello et al. 2025, Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786. With U [rows, p] and
V [q, cols] the singular bases of all left factors side by side and of all right factors one above the other, brick i's
delta is U MᵢV with Mᵢ = (UᵀLᵢ)(RᵢVᵀ) [p, q], exactly; p and q are at most the sum of the ranks. A method merges the Mᵢ into M
and the tensor gets U M V, which stays a product of two factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.merge.streaming.selection import selected
from workbench.steps import Block, Combination, Group, Memo, MergeMethod
from workbench.weights.lowrank import Factors
from workbench.weights.sparse import Rows, Selection
from workbench.weights.specs import TensorSpec

# Directions of stacked factors below this share of the largest are rounding errors of float64.
_RESOLUTION = 1e-12


@dataclass
class CoreGroup:
    """One tensor in the core space; implements `registry.Group`.

    A block's base is empty: the base is not in the adapters' span, so a method that reads it cannot declare "core".
    """

    group: Group
    left: Tensor
    """U [rows, p], float64."""
    right: Tensor
    """V [q, cols], float64."""
    cores: list[Tensor]
    """Mᵢ [p, q], float32, one a brick."""

    def __post_init__(self) -> None:
        self.tensor, self.survey = self.group.tensor, self.group.survey
        self.model, self.notes = self.group.model, self.group.notes
        self.device, self.seed = self.group.device, self.group.seed
        self.memo: Memo | None = None  # core matrices are in a basis that all bricks share
        self.spec = TensorSpec((self.left.shape[1], self.right.shape[0]), torch.float32)

    @property
    def keys(self) -> list[str]:
        """Digest of each brick's content."""
        return self.group.keys

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor itself."""
        return self.group.shape

    @property
    def bricks(self) -> list[str]:
        """Names of the bricks, in the step's order."""
        return self.group.bricks

    def value(self, field: str) -> float:
        """The step's field at this tensor."""
        return self.group.value(field)

    def values(self, field: str) -> list[float]:
        """A per-brick field at this tensor."""
        return self.group.values(field)

    def models(self) -> Iterator[list[Tensor]]:
        """There are none: a model is not in the adapters' span."""
        raise NotImplementedError("a method that reads models cannot declare the core space")

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop of the core matrices."""
        return Rows(None, [core[start:stop] for core in self.cores], [True] * len(self.cores))

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Factors were checked when they were read."""

    def blocks(self) -> Iterator[Block]:
        """One block: core matrices are small."""
        yield self.whole()

    def whole(self) -> Block:
        """The core matrices, in memory of their own."""
        return Block(torch.empty(0, device=self.device), [core.clone() for core in self.cores], 0)

    def factors(self) -> list[Factors | None]:
        """A core matrix is not kept as factors."""
        return [None] * len(self.cores)

    def outside(self, core: Tensor) -> Factors:
        """A core matrix M [p, q] as the tensor's update U M V, of rank min(p, q)."""
        if core.shape[0] <= core.shape[1]:
            return Factors(self.left.float(), (core.double() @ self.right).float())
        return Factors((self.left @ core.double()).float(), self.right.float())


def takes_core(method: MergeMethod, group: Group) -> bool:
    """Whether a step merges a tensor in the core space, as far as its shape says: asked for, or the same numbers for less work."""
    same = method.laws.rotation_invariant and method.laws.memory == "tensor"
    return len(group.shape) == 2 and (method.in_core_space() or same)


def core_group(method: MergeMethod, group: Group) -> CoreGroup | None:
    """A tensor as a core-space method sees it; None where the step merges it whole: see `takes_core`, or a brick has no factors."""
    if not takes_core(method, group):
        return None
    known = ("core", group.tensor, *group.keys) if group.memo is not None else ()
    if group.memo is not None and (kept := group.memo.get(known)):
        return CoreGroup(group, *kept)
    found = group.factors()
    factors = [f for f in found if f is not None]
    if len(factors) < len(found):
        return None
    left = _basis(torch.cat([f.left for f in factors], 1).double())
    right = _basis(torch.cat([f.right for f in factors], 0).double().T).T
    cores = [((left.T @ f.left.double()) @ (f.right.double() @ right.T)).float() for f in factors]
    if group.memo is not None:
        group.memo.keep(known, (left, right, cores))
    return CoreGroup(group, left, right, cores)


def core_update(method: MergeMethod, group: Group) -> Factors | None:
    """What a step adds to a tensor that it merges in the core space; None where it merges it whole."""
    core = core_group(method, group)
    if core is None:
        return None
    if not core.spec.numel:  # every factor is zero
        return Factors(core.left[:, :0].float(), core.right[:0].float())
    prepared = method.prepare(core)
    if isinstance(prepared, Combination):
        assert prepared.base == 0, f"{method.name} declares the core space and reads the base"
        merged = torch.zeros_like(core.cores[0], dtype=torch.float64)
        for matrix, weight in zip(core.cores, prepared.weights, strict=True):
            merged.add_(matrix.double(), alpha=weight)
        return core.outside(merged)
    block = core.whole()
    return core.outside(selected(prepared, block.deltas) if isinstance(prepared, Selection) else prepared(block))


def whole_tensors(method: MergeMethod, groups: Iterable[Group]) -> list[str]:
    """Tensors that a `space: core` step merges whole: vectors, fused experts, and where a brick's delta is no product."""
    if not method.in_core_space():
        return []
    return [g.tensor for g in groups if not takes_core(method, g) or any(f is None for f in g.factors())]


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal basis [size, p] of the span of columns [size, count]: their left singular vectors, as the paper takes them.

    Element-wise methods depend on the basis. This one does not depend on the order of the columns.
    """
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = q @ u[:, values > _RESOLUTION * values[:1]]
    return basis
