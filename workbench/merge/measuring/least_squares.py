"""Weighted least squares over one linear layer: the solver behind RegMean and WUDI, and what it reports."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_conv1d_layer, is_head
from workbench.models.layout import Model
from workbench.steps import Block, Combination, Group, Prepared
from workbench.steps.fields import BrickEntry, lowest


def solve(deltas: Sequence[Tensor], grams: Sequence[Callable[[], Tensor]], weights: Sequence[float], ridge: float) -> Tensor:
    """The delta that is nearest to all bricks' on their inputs: min over Δ of Σ wᵢ tr((Δ − τᵢ) Gᵢ' (Δ − τᵢ)ᵀ).

    Δ = (Σ wᵢ τᵢ Gᵢ') (Σ wᵢ Gᵢ')⁻¹ with Gᵢ' = Gᵢ + ε·I, ε = ridge · mean of the diagonal of Σ wᵢGᵢ / Σ wᵢ. The ridge stands on every
    Gram, so that it pulls to the bricks' weighted mean, not to the base: equal Grams give that mean for any ridge, and so
    does every direction of the inputs that no Gram has seen (Jin et al. 2023, RegMean, arXiv 2212.09849, eq. 2).

    Args:
        deltas: τᵢ [out, in], one a brick.
        grams: Give Gᵢ [in, in], symmetric and positive semidefinite; called one after the other, one in memory at a time.
        weights: wᵢ ≥ 0, not all 0.
        ridge: Relative to the mean diagonal.

    Returns:
        Δ [out, in], float32; solved in float64. Errors: a singular system.
    """
    used = [(tau, gram, w) for tau, gram, w in zip(deltas, grams, weights, strict=True) if w]
    if len(used) == 1:
        return used[0][0].clone()
    size, total = deltas[0].shape[1], sum(w for _, _, w in used)
    left = torch.zeros(size, size, dtype=torch.float64, device=deltas[0].device)
    right = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    for tau, gram, weight in used:
        weighted = gram().double().mul_(weight)
        left += weighted
        right.addmm_(tau.double(), weighted)
        del weighted
    trace = float(left.trace())
    if trace == 0:  # no brick changes what this layer reads: all directions are alike
        left.fill_diagonal_(total)
        ridge, trace = 0.0, 1.0
        right = sum((tau.double() * w for tau, _, w in used), torch.zeros_like(right))
    epsilon = ridge * trace / size / total
    left.diagonal().add_(epsilon * total)
    for tau, _, weight in used:
        right.add_(tau, alpha=epsilon * weight)
    factor, info = torch.linalg.cholesky_ex(left)
    if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise WorkbenchError(f"the least-squares system of {size} inputs is singular at ridge {ridge:g}", "Raise `ridge`.")
    return torch.cholesky_solve(right.T, factor).T.float()


def linear_deltas(group: Group) -> list[Tensor]:
    """Every brick's delta of a linear layer as [out, in], whichever way it is stored."""
    deltas = group.whole().deltas
    return [delta.T for delta in deltas] if is_conv1d(group.model, group.tensor) else deltas


def merge_linear(
    group: Group,
    deltas: Sequence[Tensor],
    grams: Sequence[Callable[[], Tensor]],
    ridge: float,
    scale: float = 1.0,
    *,
    method: str,
) -> Prepared:
    """Solve one linear layer's weight; notes the norm of the result against the bricks' (`norm_report`).

    Args:
        group: The tensor.
        deltas: As `linear_deltas` gives them.
        grams: As `solve`.
        ridge: As `solve`.
        scale: What the result is multiplied with.
        method: How errors call the step.
    """
    weights = checked_weights(group, method)
    try:
        solved = solve(deltas, grams, weights, ridge)
    except WorkbenchError as error:
        raise WorkbenchError(f"{method}: {group.tensor}: {error.message}", error.hint) from None
    norms = [float(delta.norm()) for delta, weight in zip(deltas, weights, strict=True) if weight]
    mean = sum(norms) / len(norms)
    group.notes[group.tensor] = {"norm_ratio": float(solved.norm()) / mean if mean else 0.0}
    result = (solved.T if is_conv1d(group.model, group.tensor) else solved).mul(scale).contiguous()

    def delta(block: Block) -> Tensor:
        return result[block.start : block.start + block.base.shape[0]]

    return delta


def average(group: Group, scale: float = 1.0, *, method: str) -> Combination:
    """The weighted mean, for tensors that are not a linear layer's weight or have no Gram; noted as such."""
    weights = checked_weights(group, method)
    total = sum(weights)
    group.notes[group.tensor] = {"averaged": True}
    return Combination([scale * w / total for w in weights])


def checked_weights(group: Group, method: str) -> list[float]:
    """The bricks' weights at a tensor. Errors: one below 0, or all 0."""
    weights = group.values("weight")
    if min(weights) < 0 or sum(weights) == 0:
        raise WorkbenchError(
            f"{method}: the weights at {group.tensor} are {', '.join(f'{w:g}' for w in weights)}",
            "They weigh squared errors: give each brick 0 or more and one more than 0; to forget a skill use `merge: task_arithmetic`.",
        )
    return weights


def not_negative(bricks: Mapping[str, Any] | None) -> None:
    """For validators of `bricks`: weights of squared errors. Errors (ValueError): one below 0."""
    for name, entry in (bricks or {}).items():
        weight = entry.weight if isinstance(entry, BrickEntry) else entry
        if lowest(weight) < 0:
            raise ValueError(f"the weight of '{name}' is {lowest(weight):g}: it weighs squared errors, expected 0 or more")


def is_linear(model: Model, tensor: str) -> bool:
    """Whether a tensor is the weight of a linear layer inside the layer stack, or of an untied head."""
    if len(model.weights.specs[tensor].shape) != 2 or not tensor.endswith(".weight"):
        return False
    if model.layout.layer(tensor) is not None:
        return True
    return is_head(tensor) and not model.config.get("tie_word_embeddings", False)


def is_conv1d(model: Model, tensor: str) -> bool:
    """Whether the weight of a linear layer is stored [in, out]."""
    return is_conv1d_layer(model.config, tensor.removesuffix(".weight"))


def solver_bytes(model: Model, tensor: str, bricks: int) -> int:
    """Memory of one solve: base and deltas in float32 and the float64 right side; beside them a delta in float64, with its square or with
    the sum of Grams, a product of the delta with itself and its scaled copy."""
    if not is_linear(model, tensor):
        return 0
    spec = model.weights.specs[tensor]
    inputs = spec.rows if is_conv1d(model, tensor) else spec.cols
    return spec.numel * (4 * (bricks + 1) + 8) + max(16 * spec.numel + 8 * inputs**2, 8 * spec.numel + 24 * inputs**2)


def norm_report(notes: Mapping[str, Any]) -> dict[str, Any]:
    """‖Δ‖ / mean ‖τᵢ‖ of the solved tensors, and how many were averaged, by name with numbers as `*`, for the step's record.

    Ratios far above 1 say that the system was near singular: raise `ridge`.
    """
    ratios = {name: note["norm_ratio"] for name, note in sorted(notes.items()) if "norm_ratio" in note}
    averaged = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name, note in sorted(notes.items()) if "averaged" in note)
    record: dict[str, Any] = {"solved": len(ratios), "averaged": dict(averaged)}
    if ratios:
        largest = max(ratios, key=lambda name: ratios[name])
        record["norm_ratio"] = {
            "median": round(statistics.median(ratios.values()), 4),
            "smallest": round(min(ratios.values()), 4),
            "largest": round(ratios[largest], 4),
            "at": largest,
        }
    return record
