"""Singular triplets of deltas in float64, and the choice of tensors that spectral methods decompose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from workbench.lazy import torch
from workbench.models.architecture import is_table
from workbench.steps import Block, Group

if TYPE_CHECKING:
    from torch import Tensor

# Singular values below this share of the largest count as zero: a low-rank delta in float32 has rounding errors of about 1e-7.
RESOLUTION = 1e-6


class Triplets(NamedTuple):
    """Singular value decomposition left · diag(values) · rightᵀ of a matrix, largest value first, without its null space."""

    left: Tensor
    """[rows, rank], float64, with orthonormal columns."""
    values: Tensor
    """[rank]"""
    right: Tensor
    """[cols, rank]"""


def singular(matrix: Tensor, max_count: int | None = None) -> Triplets:
    """Return the singular triplets of a matrix [rows, cols] whose values are not numerically zero; at most the `max_count` largest.

    They come from the eigenvectors of the smaller Gram matrix. In float64 this resolves values down to 1e-8 of the largest; the
    float32 input has a precision of 1e-7.
    """
    a = matrix.double()
    is_tall = a.shape[0] >= a.shape[1]
    squares, vectors = torch.linalg.eigh(a.T @ a if is_tall else a @ a.T)
    roots = squares.clamp_min(0).sqrt().flip(0)
    rank = int((roots > RESOLUTION * roots[:1]).sum())
    rank = rank if max_count is None else min(rank, max_count)
    gram_vectors = vectors[:, len(squares) - rank :].flip(1)
    images = a @ gram_vectors if is_tall else a.T @ gram_vectors
    values = images.norm(dim=0)
    images = images / values
    return Triplets(images, values, gram_vectors) if is_tall else Triplets(gram_vectors, values, images)


def nearest_orthogonal(columns: Tensor) -> Tensor:
    """Return the orthonormal columns nearest to the given columns X [size, count]: the polar factor X (XᵀX)^(-1/2).

    If the columns are linearly dependent, the nearest orthonormal columns are not unique; the function then returns the partial
    isometry, which adds nothing outside their span.
    """
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    nonzero = squares > RESOLUTION**2 * squares[-1:]
    vectors = vectors[:, nonzero]
    nearest: Tensor = columns @ (vectors * squares[nonzero].rsqrt()) @ vectors.T
    return nearest


def is_matrix(tensor: str, shape: tuple[int, ...], bricks: int) -> bool:
    """Return whether a tensor is decomposed.

    It must be 2-D, or 3-D with one matrix per expert, and large enough for one singular triplet per brick. Norms, biases, narrow
    kernels, embeddings and the head are not decomposed: the papers' code averages every tensor that is no weight matrix of a
    layer, and does not cover vocabularies.
    """
    return len(shape) in (2, 3) and min(shape[-2:]) >= max(2, bricks) and not is_table(tensor)


def averaged(shapes: Mapping[str, tuple[int, ...]], bricks: int) -> Iterator[str]:
    """Yield a sentence if there are tensors that are decomposed for two bricks, but are too small for so many."""
    small = [name for name, shape in shapes.items() if is_matrix(name, shape, 2) and not is_matrix(name, shape, bricks)]
    if small:
        yield (
            f"tensors with fewer rows or columns than there are bricks ({bricks}) get the weighted mean: {len(small)}, such as "
            f"{small[0]} {list(shapes[small[0]])}"
        )


def mean_weights(group: Group) -> list[float]:
    """Return λwᵢ/T, the weights for tensors that are not decomposed; with `weights: auto`, Σ aᵢ takes the place of T.

    The factors aᵢ are part of the weights wᵢ. Equal bricks have the factor 1/T each, and their mean is any of them.
    """
    lam = group.value("lam")
    count = len(group.bricks) if group.shares is None else math.fsum(group.shares)
    return [lam * w / count for w in group.values("weight")]


def whole_bytes(tensor: str, shape: tuple[int, ...], bricks: int, wide: int, square: int) -> int:
    """Return the memory in bytes to merge a whole tensor.

    It counts the base and the deltas in float32, and `wide` matrices and `square` Grams in float64. The allocator keeps freed
    buffers and reuses them for matrices of the same size (`parallel.each`), so `wide` and `square` count the buffers that a merge
    needs at the same time. The base is freed first, but is too small for reuse.
    """
    if not is_matrix(tensor, shape, bricks):
        return 0
    return 4 * math.prod(shape) * (bricks + 1) + 8 * (wide * math.prod(shape[-2:]) + square * min(shape[-2:]) ** 2)


def by_matrix(group: Group, merge: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[Block], Tensor]:
    """Merge a tensor matrix by matrix, and return a function that gives the result block by block.

    Args:
        group: The tensor. It is read whole: one float32 copy per brick, and some float64 copies while a matrix is decomposed.
        merge: Function from one matrix [rows, cols] per brick to the merged matrix [rows, cols].
    """
    deltas = group.whole().deltas
    stacks = [d.view(-1, *group.spec.shape[-2:]) for d in deltas]
    merged = deltas[0]  # each matrix is overwritten after it was read
    for i in range(len(stacks[0])):
        stacks[0][i] = merge([stack[i] for stack in stacks])
    return lambda block: merged[block.start : block.start + len(block.deltas[0])]
