"""TSV-M: each delta's leading singular triplets, decorrelated between the bricks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.merge.measuring.spectral import by_matrix, is_matrix, mean_weights, nearest_orthogonal, singular, whole_bytes
from workbench.models.layout import Model
from workbench.steps import Combination, Group, Laws, MergeMethod, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space


@register
class Tsv(MergeMethod):
    """Each brick's share of a matrix's singular triplets, whitened across bricks (Gargiulo et al. 2025, TSV-Merge).

    Of every weighted delta of a layer's weight matrix [m, n] the k = ⌊min(m, n) / T⌋ triplets of largest singular value are
    kept, T being the number of the step's bricks. All left vectors side by side, and all right ones, are replaced by the
    nearest orthonormal sets; the singular values stay. Triplets whose value is numerically zero are left out, so that
    adapters get nothing outside their span. Fused experts are merged expert by expert. Norms, biases, embeddings and the
    head get the weighted mean, λ/T Σ wτ.
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
    """Brick name -> weight; a list of names gives each weight 1; omitted: all with weight 1. Every listed brick has its share of the triplets, also with weight 0."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    space: Space = "full"
    """Merge whole deltas, or refuse what is not an adapter (core). On adapters both compute the same, from their factors."""

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Memory of one tensor of checkpoints beside the block buffers, for `plan`; the factors of adapters take next to none."""
        shape = model.weights.specs[tensor].shape
        return 0 if self.space == "core" else whole_bytes(tensor, shape, bricks, wide=5, square=6)

    def prepare(self, group: Group) -> Prepared:
        """Merge the whole tensor."""
        if not is_matrix(group.tensor, group.shape, len(group.bricks)):
            return Combination(mean_weights(group))
        weights = group.values("weight")
        lam = group.value("lam")
        share = min(group.shape[-2:]) // len(group.bricks)
        return by_matrix(group, lambda deltas: _merge(deltas, weights, share).mul_(lam))


def _merge(deltas: Sequence[Tensor], weights: Sequence[float], share: int) -> Tensor:
    parts = [singular(delta.double().mul_(weight), share) for delta, weight in zip(deltas, weights, strict=True)]
    left = nearest_orthogonal(torch.cat([p.left for p in parts], 1))
    right = nearest_orthogonal(torch.cat([p.right for p in parts], 1))
    return left * torch.cat([p.values for p in parts]) @ right.T
