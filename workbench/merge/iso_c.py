"""Iso-C: the sum of the deltas, with all singular values replaced by their mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.ground.lazy import torch
from workbench.merge.measuring.matrices import averaged, by_matrix, is_matrix, mean_weights, singular, whole_bytes
from workbench.models.layout import Model
from workbench.steps import Combination, Group, Laws, MergeMethod, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space

if TYPE_CHECKING:
    from torch import Tensor


@register
class IsoC(MergeMethod):
    """The sum of the deltas with a flat spectrum: all singular values become equal (Marczak et al. 2025, Iso-C).

    For each weight matrix of a layer, every singular value of Σ wτ becomes the mean of those that are not numerically zero (at least
    1e-6 of the largest). For checkpoints, this is the paper's formula. For adapters, it keeps the result inside their span.

    Fused experts are merged one by one. Norms, biases, embeddings, the head, and matrices with fewer rows or columns than there are
    bricks get the weighted mean λ/T Σ wτ. The paper tunes λ on held-out data.
    """

    paper = "Marczak et al. 2025, No Task Left Behind: isotropic model merging, arXiv 2502.04959"
    formula = "θ = θ₀ + λ σ̄ UVᵀ,  UΣVᵀ = svd(Σ wᵢτᵢ),  σ̄ = mean of the non-zero σ"
    laws = Laws(
        single_is_identity=False,
        linear_in_weight=True,
        passes=2,
        spaces=("full", "core"),
        rotation_invariant=True,
        exact_rank=True,
        memory="tensor",
    )

    merge: Literal["iso_c"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    space: Space = "full"
    """`full` accepts adapters and checkpoints; `core` accepts adapters only. On adapters both compute the same result from the
    low-rank factors."""

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the memory to merge one tensor of checkpoints; the factors of adapters need almost none."""
        shape = model.weights.specs[tensor].shape
        return 0 if self.space == "core" else whole_bytes(tensor, shape, bricks, wide=4, square=5)

    def limits(self, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int], bricks: int) -> Iterator[str]:
        """Yield that small tensors are averaged."""
        return averaged(shapes, bricks)

    def prepare(self, group: Group) -> Prepared:
        """Merge the whole tensor at once, and return its rows block by block."""
        if not is_matrix(group.tensor, group.shape, len(group.bricks)):
            return Combination(mean_weights(group))
        weights = group.values("weight")
        lam = group.value("lam")
        return by_matrix(group, lambda deltas: _merge(deltas, weights).mul_(lam))


def _merge(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the merged delta: the sum with all singular values replaced by their mean."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta.double(), alpha=weight)
    parts = singular(total)
    return parts.left * (parts.values.sum() / max(1, len(parts.values))) @ parts.right.T
