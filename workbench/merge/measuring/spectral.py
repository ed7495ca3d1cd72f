"""Singular triplets of deltas in float64, and which tensors spectral methods treat as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.models.architecture import is_table
from workbench.steps import Block, Group

# A singular value below this share of the largest counts as zero: a float32 delta of low rank holds rounding errors of 1e-7.
RESOLUTION = 1e-6


class Triplets(NamedTuple):
    """A matrix as left · diag(values) · rightᵀ, largest value first, without its null space."""

    left: Tensor
    """[rows, rank], float64, orthonormal columns."""
    values: Tensor
    """[rank]"""
    right: Tensor
    """[cols, rank]"""


def singular(matrix: Tensor, most: int | None = None) -> Triplets:
    """The singular triplets of a matrix [rows, cols] whose values are not numerically zero; at most the `most` largest.

    By the eigenvectors of the smaller Gram matrix: float64 resolves values down to 1e-8 of the largest, float32 input holds 1e-7.
    """
    a = matrix.double()
    tall = a.shape[0] >= a.shape[1]
    squares, vectors = torch.linalg.eigh(a.T @ a if tall else a @ a.T)
    roots = squares.clamp_min(0).sqrt().flip(0)
    kept = int((roots > RESOLUTION * roots[:1]).sum())
    kept = kept if most is None else min(kept, most)
    near = vectors[:, len(squares) - kept :].flip(1)
    far = a @ near if tall else a.T @ near
    values = far.norm(dim=0)
    far = far / values
    return Triplets(far, values, near) if tall else Triplets(near, values, far)


def nearest_orthogonal(columns: Tensor) -> Tensor:
    """The orthonormal columns nearest to the given ones [size, count]: X (XᵀX)^(-1/2), the polar factor of X.

    Where columns depend on each other the nearest ones are not unique; this is the partial isometry, which adds nothing
    outside their span.
    """
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = squares > RESOLUTION**2 * squares[-1:]
    vectors = vectors[:, kept]
    nearest: Tensor = columns @ (vectors * squares[kept].rsqrt()) @ vectors.T
    return nearest


def is_matrix(tensor: str, shape: tuple[int, ...], bricks: int) -> bool:
    """Whether a tensor is decomposed: 2-D, or 3-D as one matrix an expert, with a singular triplet for each brick at least.

    Norms, biases, narrow kernels, embeddings and the head are not: the papers' code averages what is no weight matrix of a
    layer, and has no vocabularies.
    """
    return len(shape) in (2, 3) and min(shape[-2:]) >= max(2, bricks) and not is_table(tensor)


def mean_weights(group: Group) -> list[float]:
    """λwᵢ/T: what the methods do with a tensor that is not decomposed."""
    lam = group.value("lam")
    return [lam * w / len(group.bricks) for w in group.values("weight")]


def whole_bytes(tensor: str, shape: tuple[int, ...], bricks: int, wide: int, square: int) -> int:
    """Memory that a tensor takes whole: base and deltas in float32, `wide` matrices and `square` Grams in float64 beside them.

    What is freed in between is kept by the allocator and reused for matrices of the same size (`parallel.each`), so `wide` and `square`
    count the places that a merge needs at once. The base, which is freed first, is too small for a place.
    """
    if not is_matrix(tensor, shape, bricks):
        return 0
    return 4 * math.prod(shape) * (bricks + 1) + 8 * (wide * math.prod(shape[-2:]) + square * min(shape[-2:]) ** 2)


def by_matrix(group: Group, merge: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[Block], Tensor]:
    """Merge a tensor matrix by matrix, at once; the result is handed out in blocks.

    Args:
        group: The tensor; read whole, so that one float32 copy a brick is held, and some in float64 while it is decomposed.
        merge: One [rows, cols] a brick -> [rows, cols].
    """
    deltas = group.whole().deltas
    stacks = [d.view(-1, *group.spec.shape[-2:]) for d in deltas]
    merged = deltas[0]  # overwritten matrix by matrix, each after it was read
    for i in range(len(stacks[0])):
        stacks[0][i] = merge([stack[i] for stack in stacks])
    return lambda block: merged[block.start : block.start + len(block.deltas[0])]
