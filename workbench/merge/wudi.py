"""WUDI: the sum of the deltas, corrected where their inputs interfere most; it needs no data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.ground.lazy import torch
from workbench.merge.measuring.calibration import norm_report
from workbench.merge.measuring.matrices import averaged, by_matrix, is_matrix, mean_weights
from workbench.models.architecture import is_conv1d_layer
from workbench.models.layout import Model
from workbench.steps import Combination, Group, Laws, MergeMethod, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Space

if TYPE_CHECKING:
    from torch import Tensor


@register
class Wudi(MergeMethod):
    """The sum of the deltas, corrected where their inputs interfere most (Cheng et al. 2025, WUDI-Merging; 2026, SWUDI).

    For a weight matrix of a layer, WUDI minimizes Σ ‖(Δ − vᵢ) vᵢᵀ‖² / ‖vᵢ‖² over Δ, with vᵢ = wᵢτᵢ. Its full solution becomes much
    longer than the sum. SWUDI starts from the sum and takes the solution only in the K input directions with the most energy, where
    K is the participation count of the spectrum.

    Fused experts are merged one by one. Norms, biases, embeddings, the head, and matrices with fewer rows or columns than there are
    bricks get the weighted mean λ/T Σ wτ. On the starter bricks the method does not beat the sum;
    docs/merging-methods.md has the figures.
    """

    paper = (
        "Cheng et al. 2025, Whoever started the interference should end it, arXiv 2503.08099; the filter: SWUDI, arXiv 2606.07289"
    )
    formula = (
        "θ = θ₀ + λ (S + (D C⁻¹ − S) V_K V_Kᵀ),  S = Σ vᵢ,  C = Σ vᵢᵀvᵢ/‖vᵢ‖² = V diag(c) Vᵀ,  D = Σ vᵢvᵢᵀvᵢ/‖vᵢ‖²,  vᵢ = wᵢτᵢ,  "
        "K = (Σ √c)² / Σ c, rounded"
    )
    laws = Laws(
        linear_in_weight=True, passes=2, spaces=("full", "core"), rotation_invariant=True, exact_rank=True, memory="tensor"
    )
    version = 3  # the filter instead of a ridge; weights scale the deltas

    merge: Literal["wudi"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks. Every
    listed brick counts toward T, even with weight 0."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the merged delta."""
    space: Space = "full"
    """`full` accepts adapters and checkpoints; `core` accepts adapters only. On adapters both compute the same result from the
    low-rank factors."""

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the memory to merge one tensor of checkpoints; the factors of adapters need almost none.

        It counts the base and the deltas, as read and weighed, in float32; the sum, D and two products in float64; and C with its
        eigenvectors and what LAPACK needs for them, twice their size.
        """
        shape = model.weights.specs[tensor].shape
        if self.space == "core" or not is_matrix(tensor, shape, bricks):
            return 0
        inputs = shape[-2] if is_conv1d_layer(model.config, tensor.removesuffix(".weight")) else shape[-1]
        return 4 * math.prod(shape) * (2 * bricks + 1) + 8 * (4 * math.prod(shape[-2:]) + 4 * inputs**2)

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return the norms of the merged matrices relative to the bricks' norms."""
        return norm_report(notes)

    def limits(self, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int], bricks: int) -> Iterator[str]:
        """Yield that small tensors are averaged."""
        return averaged(shapes, bricks)

    def prepare(self, group: Group) -> Prepared:
        """Merge the whole tensor at once, and return its rows block by block."""
        if not is_matrix(group.tensor, group.shape, len(group.bricks)):
            group.notes[group.tensor] = {"averaged": True}
            return Combination(mean_weights(group))
        weights, lam = group.values("weight"), group.value("lam")
        flipped = is_conv1d_layer(group.model.config, group.tensor.removesuffix(".weight"))
        ratios: list[float] = []

        def merge(deltas: Sequence[Tensor]) -> Tensor:
            scaled = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
            merged = filtered([delta.T for delta in scaled] if flipped else scaled)
            norms = [float(delta.norm()) for delta in scaled if bool(delta.any())]
            ratios.append(float(merged.norm()) / (sum(norms) / len(norms)) if norms else 0.0)
            return (merged.T if flipped else merged).mul(lam)

        block = by_matrix(group, merge)
        group.notes[group.tensor] = {"norm_ratio": max(ratios)}
        return block


def filtered(deltas: Sequence[Tensor]) -> Tensor:
    """Return S + (D C⁻¹ − S) V_K V_Kᵀ of deltas vᵢ [out, in], in float64.

    On an eigenvector u of C with eigenvalue c, D C⁻¹ u is D u / c, so that C is never inverted.
    """
    total, right, gram = _sums(deltas)
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp_min(0).sqrt()
    if not float(roots.sum()):
        return total
    count = max(1, round(float(roots.sum() ** 2 / roots.square().sum())))
    leading = vectors[:, -count:]
    return total.addmm_(right @ (leading / values[-count:]) - total @ leading, leading.T)


def _sums(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, D and C. The matrices of one delta are freed before C is decomposed."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    right, gram = torch.zeros_like(total), total.new_zeros(total.shape[1], total.shape[1])
    for delta in deltas:
        wide = delta.double()
        total += wide
        if energy := float(wide.square().sum()):
            own = (wide.T @ wide).div_(energy)
            gram += own
            right.addmm_(wide, own)
    return total, right, gram
