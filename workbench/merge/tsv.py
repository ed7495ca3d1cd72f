"""TSV-M: the leading singular triplets of each delta, decorrelated between the bricks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.ground.lazy import torch
from workbench.merge.measuring.matrices import (
    averaged,
    by_matrix,
    is_matrix,
    mean_weights,
    nearest_orthogonal,
    singular,
    whole_bytes,
)
from workbench.models.layout import Model
from workbench.steps import Combination, Group, KeyContext, Laws, OverlapWeighted, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space

if TYPE_CHECKING:
    from torch import Tensor


@register
class Tsv(OverlapWeighted):
    """The leading singular triplets of each brick's delta, whitened across bricks (Gargiulo et al. 2025, TSV-Merge).

    For a weight matrix [m, n] of a layer and T bricks, each weighted delta keeps its k = ⌊min(m, n) / T⌋ largest triplets. All left
    vectors together, and all right vectors together, are replaced by the nearest orthonormal set. Triplets with a numerically zero
    singular value are dropped, so the result of adapters stays inside their span.

    Fused experts are merged one by one. Norms, biases, embeddings, the head, and matrices with fewer rows or columns than there are
    bricks get the weighted mean λ/T Σ wτ.

    Whitening already takes away a part of what bricks have in common: of equal deltas it leaves one. `weights: auto` therefore divides
    each brick's weight by the mean cosines of its singular vectors, left and right, with the whitened ones, and the mean by the
    sum of the factors instead of T.
    """

    paper = "Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081"
    formula = (
        "θ = θ₀ + λ Û diag(σ) V̂ᵀ,  Û = polar([U₁ … U_T]),  V̂ = polar([V₁ … V_T]),  UᵢΣᵢVᵢᵀ = svd_k(wᵢτᵢ),  k = ⌊min(m, n)/T⌋"
    )
    laws = Laws(
        linear_in_weight=True, passes=2, spaces=("full", "core"), rotation_invariant=True, exact_rank=True, memory="tensor"
    )

    merge: Literal["tsv"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks. Every
    listed brick counts toward T, even with weight 0."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    space: Space = "full"
    """`full` accepts adapters and checkpoints; `core` accepts adapters only. On adapters both compute the same result from the
    low-rank factors."""

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the memory to merge one tensor of checkpoints; the factors of adapters need almost none."""
        shape = model.weights.specs[tensor].shape
        return 0 if self.space == "core" else whole_bytes(tensor, shape, bricks, wide=5, square=6)

    def limits(self, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int], bricks: int) -> Iterator[str]:
        """Yield that small tensors are averaged, and that directions of adapters are left out."""
        yield from averaged(shapes, bricks)
        counts = {name: min(shapes[name][-2:]) // bricks for name in ranks if is_matrix(name, shapes[name], bricks)}
        if cut := [name for name, count in counts.items() if count < ranks[name]]:
            yield (
                f"each brick keeps its min(m, n) / {bricks} largest directions, fewer than an adapter's rank at {len(cut)} tensors, "
                f"such as {cut[0]} {list(shapes[cut[0]])}: {counts[cut[0]]} of {ranks[cut[0]]}"
            )

    def prepare(self, group: Group) -> Prepared:
        """Merge the whole tensor at once, and return its rows block by block."""
        if not is_matrix(group.tensor, group.shape, len(group.bricks)):
            return Combination(mean_weights(group))
        weights = group.values("weight")
        lam = group.value("lam")
        share = min(group.shape[-2:]) // len(group.bricks)
        auto = self.weighs_overlap()
        return by_matrix(group, lambda deltas: _merge(deltas, weights, share, auto).mul_(lam))

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the same as any merge, and the version of `weights: auto` where it is set."""
        return [*super().key_parts(context), *([{"auto": 2}] if self.weighs_overlap() else [])]


def _merge(deltas: Sequence[Tensor], weights: Sequence[float], share: int, auto: bool) -> Tensor:
    """Return the merged delta: truncated singular vectors of all bricks, made orthogonal."""
    parts = [singular(delta.double().mul_(weight), share) for delta, weight in zip(deltas, weights, strict=True)]
    left = nearest_orthogonal(torch.cat([p.left for p in parts], 1))
    right = nearest_orthogonal(torch.cat([p.right for p in parts], 1))
    values = [p.values for p in parts]
    if auto:
        sizes = [len(p.values) for p in parts]
        values = [
            p.values / (_left_over(p.left, u, p.values) * _left_over(p.right, v, p.values))
            for p, u, v in zip(parts, torch.split(left, sizes, 1), torch.split(right, sizes, 1), strict=True)
        ]
    return left * torch.cat(values) @ right.T


def _left_over(vectors: Tensor, whitened: Tensor, values: Tensor) -> Tensor:
    """Return the mean cosine of singular vectors with the whitened ones, each counted by its squared singular value.

    It is 1 for bricks that share no directions, and 1/√T for T equal ones, whose whitened vectors are shorter.
    """
    squares = values.square()
    return ((vectors * whitened).sum(0) * squares).sum() / squares.sum()
