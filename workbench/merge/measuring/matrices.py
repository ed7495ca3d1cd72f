"""What merge methods measure on weight matrices alone: singular triplets in float64, the choice of matrices, and how much bricks overlap.

For the deltas τᵢ, τⱼ [out, in] of one matrix, RVᵢⱼ = ‖τᵢᵀτⱼ‖² / (‖τᵢᵀτᵢ‖ · ‖τⱼᵀτⱼ‖) is the RV coefficient of Robert & Escoufier
1976 between τᵢ and τⱼ: the cosine of their Grams ττᵀ. It is 1 for equal deltas, 0 for deltas that write to orthogonal outputs,
and depends on neither the scale nor the sign of a delta. Left factors of LoRA adapters start at zero, so their overlap is
learned; right factors stay near their random start, so the cosine of whole deltas mostly shows whether two trainings had one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d_layer, is_table
from workbench.steps import Block, Group
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.steps import Group


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
    return rows_of(merged)


def rows_of(delta: Tensor) -> Callable[[Block], Tensor]:
    """Return a function that gives a whole merged delta [rows, cols] block by block."""
    return lambda block: delta[block.start : block.start + len(block.deltas[0])]


Pairs = tuple[tuple[float, ...], ...]
"""[bricks, bricks]"""


@dataclass(frozen=True)
class Overlap:
    """Mean RV coefficients of a merge step's bricks.

    Attributes:
        bricks: Names, in the order of the rows.
        pairs: [bricks, bricks], the mean over all matrices that at least one brick of the pair changes; the diagonal is 1.
        layers: Layer -> the same for its matrices, for each layer that at least one brick changes.
    """

    bricks: tuple[str, ...]
    pairs: Pairs
    layers: Mapping[int, Pairs]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each brick, 1 / Σⱼ RVᵢⱼ: 1 for a brick that overlaps with no other, 1/T for T bricks with equal deltas."""
        return {name: 1 / math.fsum(row) for name, row in zip(self.bricks, self.pairs, strict=True)}

    def row(self) -> dict[str, object]:
        """Return weights and coefficients as plain data, for the step's record."""
        return {"weights": self.weights, "rv": {name: list(row) for name, row in zip(self.bricks, self.pairs, strict=True)}}


class _Means:
    """Sums of coefficients over matrices, and the number of matrices that a pair changes."""

    def __init__(self, bricks: int) -> None:
        self.sums = [[0.0] * bricks for _ in range(bricks)]
        self.numbers = [[0] * bricks for _ in range(bricks)]

    def add(self, products: Sequence[Sequence[float]]) -> None:
        """Add one matrix, given ‖τᵢᵀτⱼ‖² of all pairs."""
        for i, own in enumerate(products):
            for j in range(i):
                self.numbers[i][j] += own[i] > 0 or products[j][j] > 0
                self.sums[i][j] += coefficient(own[j], own[i], products[j][j])

    def pairs(self) -> Pairs:
        """Return the means as a symmetric matrix with a diagonal of 1."""

        def mean(i: int, j: int) -> float:
            return self.sums[i][j] / self.numbers[i][j] if self.numbers[i][j] else 0.0

        places = range(len(self.sums))
        return tuple(tuple(1.0 if i == j else mean(max(i, j), min(i, j)) for j in places) for i in places)


def overlap(groups: Iterable[Group], bricks: Sequence[str]) -> Overlap:
    """Measure the mean RV coefficients over the weight matrices of a merge.

    Vectors, embeddings and the head do not count. A matrix that one brick changes and another does not counts as 0 for the pair.

    Args:
        groups: The tensors of the merge. Deltas without low-rank factors are read whole, one tensor at a time.
        bricks: Names of the bricks, in the order of each group's deltas.

    Returns:
        The overlap. If no brick changes a matrix, every pair has 0.
    """
    total = _Means(len(bricks))
    layers: dict[int, _Means] = {}
    for group in groups:
        for products in squared_products(group):
            total.add(products)
            layer = group.model.layer_of(group.tensor)
            if layer is not None and any(products[i][i] > 0 for i in range(len(bricks))):
                layers.setdefault(layer, _Means(len(bricks))).add(products)
    return Overlap(tuple(bricks), total.pairs(), {layer: layers[layer].pairs() for layer in sorted(layers)})


def coefficient(product: float, own: float, other: float) -> float:
    """Return the RV coefficient ‖τᵢᵀτⱼ‖² / (‖τᵢᵀτᵢ‖ · ‖τⱼᵀτⱼ‖) from three squared norms; 0 if one of the deltas is 0."""
    return product / math.sqrt(own * other) if own > 0 and other > 0 else 0.0


def squared_products(group: Group) -> Iterator[list[list[float]]]:
    """Yield ‖τᵢᵀτⱼ‖² for all pairs of bricks, [bricks, bricks] in float64, of each matrix of a tensor.

    A stack of experts yields one entry for each expert; vectors, embeddings and the head yield none.
    """
    shape = group.shape
    if not _counts(group.tensor, shape):
        return
    flipped = is_conv1d_layer(group.model.config, group.tensor.removesuffix(".weight"))
    factors = group.factors() if len(shape) == 2 else [None]
    low_rank = [f for f in factors if f is not None]
    if len(low_rank) == len(factors):
        yield _of_factors([f.transposed() if flipped else f for f in low_rank])
        return
    stacks = [delta.view(-1, *shape[-2:]) for delta in group.whole().deltas]
    for matrices in zip(*stacks, strict=True):
        yield _of_dense([m.T if flipped else m for m in matrices])


def overlap_bytes(tensor: str, shape: Sequence[int], bricks: int) -> int:
    """Return the bytes that measuring one tensor of checkpoints needs: base and deltas in float32, and Grams of the smaller side."""
    if not _counts(tensor, shape):
        return 0
    return 4 * math.prod(shape) * (bricks + 1) + (4 + 8) * bricks * min(shape[-2:]) ** 2


def _counts(tensor: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor counts for the overlap: a matrix of a layer, or a stack of them."""
    return len(shape) in (2, 3) and min(shape[-2:]) > 1 and not is_table(tensor)


def _of_factors(factors: Sequence[Factors]) -> list[list[float]]:
    """Return ‖τᵢᵀτⱼ‖² = tr(Kᵢ M Kⱼ Mᵀ) with M = LᵢᵀLⱼ and Kᵢ = RᵢRᵢᵀ, for τ = L R."""
    lefts = [f.left.double() for f in factors]
    inner = [right @ right.T for right in (f.right.double() for f in factors)]

    def product(i: int, j: int) -> float:
        between = lefts[i].T @ lefts[j]
        return float(((inner[i] @ between) * (between @ inner[j])).sum())

    return _symmetric(len(factors), product)


def _of_dense(deltas: Sequence[Tensor]) -> list[list[float]]:
    """Return ‖τᵢᵀτⱼ‖² of dense matrices [out, in], with no more memory than the smaller side squared for each brick."""
    rows, cols = deltas[0].shape
    if rows <= cols:
        grams = [(delta @ delta.T).double() for delta in deltas]
        return _symmetric(len(deltas), lambda i, j: float((grams[i] * grams[j]).sum()))
    return _symmetric(len(deltas), lambda i, j: float(torch.linalg.matrix_norm((deltas[i].T @ deltas[j]).double())) ** 2)


def _symmetric(count: int, product: Callable[[int, int], float]) -> list[list[float]]:
    values = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i, count):
            values[i][j] = values[j][i] = product(i, j)
    return values


def is_used(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return where a brick uses the merged delta, bool: |τ| ≥ t·|τ_mt − τ| (Wang et al. 2024, eq. 5)."""
    return delta.abs() >= (total - delta).abs_().mul_(threshold)


def masked_sum(
    weights: Sequence[float], choose: Callable[[list[Tensor], Tensor], Tensor], lam: float
) -> Callable[[Block], Tensor]:
    """Return the function from a block to λ·m⊙Σwᵢτᵢ.

    Args:
        weights: One weight per brick.
        choose: Returns the mask m from the weighted deltas and their sum.
        lam: λ.
    """

    def delta(block: Block) -> Tensor:
        deltas = [one.mul_(weight) for one, weight in zip(block.deltas, weights, strict=True)]
        total = torch.zeros_like(deltas[0])
        for one in deltas:
            total.add_(one)
        return total.mul_(choose(deltas, total)).mul_(lam)

    return delta
