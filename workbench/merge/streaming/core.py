"""Core Space: express the adapters' deltas as small matrices in a common basis, merge those, and map the result back.

Panariello et al. 2025, Accurate and Efficient Low-Rank Model Merging in Core Space, arXiv 2509.17786. Let U [rows, p] be the
singular basis of all left factors concatenated by columns, and V [q, cols] that of all right factors concatenated by rows. Then
brick i's delta is exactly U MᵢV with Mᵢ = (UᵀLᵢ)(RᵢVᵀ) [p, q], where p and q are at most the sum of the ranks. A method merges
the Mᵢ into M, and the tensor's update is U M V, which is still a product of two factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.merge.streaming.group import TensorGroup, selected
from workbench.steps import Block, Combination, Group, MergeMethod
from workbench.weights.lowrank import Factors
from workbench.weights.sparse import Rows, Selection
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

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
    def of(cls, group: TensorGroup, left: Tensor, right: Tensor, cores: list[Tensor]) -> CoreGroup:
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
        return CoreGroup.of(group, *stored)
    by_brick = group.factors()
    factors = [f for f in by_brick if f is not None]
    if len(factors) < len(by_brick):
        return None
    left = _basis(torch.cat([f.left for f in factors], 1).double())
    right = _basis(torch.cat([f.right for f in factors], 0).double().T).T
    cores = [((left.T @ f.left.double()) @ (f.right.double() @ right.T)).float() for f in factors]
    if group.memo is not None:
        group.memo.keep(memo_key, (left, right, cores))
    return CoreGroup.of(group, left, right, cores)


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


def whole_tensors(method: MergeMethod, groups: Iterable[Group]) -> list[str]:
    """Return the tensors that a step with `space: core` merges whole.

    These are vectors, fused experts and tensors for which a brick's delta is no low-rank product.
    """
    if not method.in_core_space():
        return []
    return [g.tensor for g in groups if not takes_core(method, g) or any(f is None for f in g.factors())]


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [size, p] of the span of columns [size, count]: their left singular vectors, as in the paper.

    The result of element-wise methods depends on the basis. This basis does not depend on the order of the columns.
    """
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = q @ u[:, values > _RESOLUTION * values[:1]]
    return basis
