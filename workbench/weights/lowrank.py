"""Low-rank deltas, such as a LoRA adapter's update of a weight, and best low-rank approximations.

Deltas are stored as factors and multiplied block by block. A dense matrix is approximated by a randomized SVD (Halko, Martinsson & Tropp
2011, Finding structure with randomness, algorithms 4.4 and 5.1, arXiv 0909.4061), a low-rank product by the SVD of its small core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.lazy import torch
from workbench.weights.kernels import multiply
from workbench.weights.specs import Source, TensorSpec, Weights, buffer, joined, matrix, zeros

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """An update of one weight, `left @ right`; the adapter's scale is part of `right`.

    Attributes:
        left: [rows, rank], float32; [experts, rows, rank] for a stack.
        right: [rank, cols], float32; [experts, rank, cols] for a stack.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.right.shape[-2]

    def of(self, expert: int | None) -> Factors:
        """Return the update of one expert of a stack; itself for None."""
        return self if expert is None else Factors(self.left[expert], self.right[expert])

    @classmethod
    def zero(cls, spec: TensorSpec, device: torch.device) -> Factors:
        """Return an update of rank 0, which changes nothing."""
        return cls(zeros(spec.rows, 0, device), zeros(0, spec.cols, device))

    @classmethod
    def of_dense(cls, delta: Tensor) -> Factors:
        """Return a dense matrix as a bit-exact product of itself and an identity matrix on its smaller side.

        Args:
            delta: [rows, cols]. The product has rank min(rows, cols).
        """
        rows, cols = delta.shape
        delta = delta.float().contiguous()
        if rows <= cols:
            return cls(torch.eye(rows, device=delta.device), delta)
        return cls(delta, torch.eye(cols, device=delta.device))

    def transposed(self) -> Factors:
        """Return the same update for a weight that is stored as [in, out] (Conv1D)."""
        left, right = (t.T if len(t.shape) == 2 else t.mT for t in (self.right, self.left))
        return Factors(left.contiguous(), right.contiguous())


def summed(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Return Σ wᵢ·leftᵢ·rightᵢ as one product, by concatenating the left factors and the weighted right factors."""
    return Factors(joined([f.left for _, f in parts], 1), joined([f.right * w for w, f in parts], 0))


def stacked(experts: Sequence[Factors]) -> Factors:
    """Return the updates of all experts as one stack, of the largest rank among them."""
    rank = max(factors.rank for factors in experts)
    alike = [padded(factors, rank) for factors in experts]
    return Factors(torch.stack([f.left for f in alike]), torch.stack([f.right for f in alike]))


def low_rank_update(weights: Weights, base: Weights, name: str, device: torch.device) -> Factors | None:
    """Return exactly what the steps between `base` and `weights` have added to one tensor, as a low-rank product.

    Args:
        weights: The result of the steps. Each step has `update(name, device)` and `current`, the weights before it.
        base: The base's weights.
        name: The tensor.
        device: The device of the factors.

    Returns:
        The product, of rank 0 if no step changes the tensor; None if a step's result is not a low-rank product.
    """
    spec = base.specs[name]
    updates: list[tuple[float, Factors]] = []
    while weights is not base:
        if not hasattr(weights, "update") or not hasattr(weights, "current"):
            return None
        part = weights.update(name, device)
        if part is None:
            return None
        updates.append((1.0, part))
        weights = weights.current
    return summed([(1.0, Factors.zero(spec, device)), *reversed(updates)])


class LowRankSource:
    """Reader of row blocks of `left @ right`."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self._left = factors.left.to(device)
        self._right = factors.right.to(device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the product."""
        multiply(self._left[start:stop], self._right, out)


@dataclass(eq=False)
class LowRankSum:
    """Weights plus a low-rank delta, such as the result of an edit."""

    current: Weights
    factors: Mapping[str, Factors]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the current weights, since an edit changes no shape."""
        return self.current.specs

    def origin(self, name: str) -> str | None:
        """Delegate to the current weights."""
        return self.current.origin(name)

    def update(self, name: str, device: torch.device) -> Factors:
        """Return the update of one tensor, of rank 0 if it has none."""
        if name not in self.factors:
            return Factors.zero(self.specs[name], device)
        return Factors(self.factors[name].left.to(device), self.factors[name].right.to(device))

    def open(self, name: str, device: torch.device) -> Source:
        """Open the sum, or the current tensor itself if it has no update."""
        source = self.current.open(name, device)
        if name not in self.factors:
            return source
        return _SumSource(source, LowRankSource(self.factors[name], device), self.specs[name], device)


class _SumSource:
    def __init__(self, left: Source, right: Source, spec: TensorSpec, device: torch.device) -> None:
        self._left, self._right = left, right
        self._cols = spec.cols
        self._scratch = buffer(spec, device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        update = matrix(self._scratch, start, stop, self._cols)
        self._left.read(start, stop, out)
        self._right.read(start, stop, update)
        out.add_(update)


OVERSAMPLE, ITERATIONS = 10, 4
# Singular values below this fraction of the largest rank-one term are rounding noise of float32 factors.
NOISE = 1e-7


def singular(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute approximately the largest singular triplets of a matrix.

    It uses a random range finder with oversampling and power iterations, or an exact SVD if the sketch would be half the matrix.

    Args:
        matrix: [rows, cols], float32.
        rank: Number of triplets.
        seed: Seed of the sketch, which is drawn on the CPU so that it is the same on every device.

    Returns:
        U [rows, k], S [k] and Vᵀ [k, cols] with k = min(rank, rows, cols).
    """
    rank = min(rank, *matrix.shape)
    width = rank + OVERSAMPLE
    if 2 * width >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
        span = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(ITERATIONS):
            span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
        left, values, right = torch.linalg.svd(span.T @ matrix, full_matrices=False)
        left = span @ left
    return left[:, :rank], values[:rank], right[:rank]


def approximate(matrix: Tensor, rank: int | None, error: float, seed: int) -> Factors:
    """Approximate a matrix by a product of the smallest rank with a given relative error.

    Args:
        matrix: [rows, cols], float32; not zero.
        rank: Largest rank; None sets no limit.
        error: Largest allowed ‖matrix − product‖ / ‖matrix‖ (Frobenius); with 0, the rank is always `rank`.
        seed: Seed of the sketches.
    """
    limit = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    if error <= 0:
        return balanced(*singular(matrix, limit, seed))
    total = squared(matrix)
    # In float32, the captured energy does not resolve errors below about 1e-3 of the norm: then all singular values are computed.
    width = min(32, limit) if error >= 1e-3 else limit
    while True:
        left, values, right = singular(matrix, width if error >= 1e-3 else min(matrix.shape), seed)
        energy = values.double().square().cpu()  # CUDA adds the terms of cumsum in no fixed order
        tails = (total - energy.cumsum(0)) if error >= 1e-3 else energy.flip(0).cumsum(0).flip(0) - energy
        sufficient = (tails <= total * error**2).nonzero()
        if len(sufficient) or width >= limit:
            count = min(limit, int(sufficient[0]) + 1) if len(sufficient) else limit
            return balanced(left[:, :count], values[:count], right[:count])
        width = min(limit, 2 * width)


def balanced(left: Tensor, values: Tensor, right: Tensor) -> Factors:
    """Return the factors of a singular value decomposition, each scaled by the square root of the singular values."""
    root = values.sqrt()
    return Factors((left * root).contiguous(), (root[:, None] * right).contiguous())


def core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD (U, S, Vᵀ in float64) of a low-rank product, by a QR of both factors and an SVD of the small core."""
    left, upper = torch.linalg.qr(factors.left.double())
    right, lower = torch.linalg.qr(factors.right.double().T)
    inner, values, outer = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner, values, outer @ right.T


def reduced(factors: Factors) -> Factors:
    """Return the same product with as few terms as possible; the factors themselves if no term can be saved."""
    if factors.rank == 0:
        return factors
    left, values, right = core(factors)
    rank = _numeric_rank(factors, values)
    return factors if rank == factors.rank else _balanced_float(left[:, :rank], values[:rank], right[:rank])


def truncated(factors: Factors, rank: int) -> Factors:
    """Return the best approximation with at most `rank` terms (Eckart–Young)."""
    if factors.rank <= rank:
        return factors
    left, values, right = core(factors)
    count = min(rank, _numeric_rank(factors, values))
    return _balanced_float(left[:, :count], values[:count], right[:count])


def _numeric_rank(factors: Factors, values: Tensor) -> int:
    """Count the singular values above the noise, which is relative to the largest term because terms may cancel."""
    terms = factors.left.double().norm(dim=0) * factors.right.double().norm(dim=1)
    return int((values > NOISE * terms.max()).sum())


def _balanced_float(left: Tensor, values: Tensor, right: Tensor) -> Factors:
    factors = balanced(left, values, right)
    return Factors(factors.left.float(), factors.right.float())


def padded(factors: Factors, rank: int) -> Factors:
    """Return the same product with zero terms added up to `rank`."""
    extra = rank - factors.rank
    if extra <= 0:
        return factors
    return Factors(torch.nn.functional.pad(factors.left, (0, extra)), torch.nn.functional.pad(factors.right, (0, 0, 0, extra)))


def inner(a: Factors, b: Factors) -> float:
    """Return ⟨A, B⟩ of two products of the same shape, from their Gram matrices."""
    return float(((a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)).sum())


def squared(matrix: Tensor) -> float:
    """Return ‖matrix‖², summed in float64 over blocks of rows."""
    total = 0.0
    for start, stop in _blocks(matrix):
        total += float(matrix[start:stop].double().square().sum())
    return total


def residual(matrix: Tensor, factors: Factors) -> float:
    """Return ‖matrix − product‖², summed in float64 over blocks of rows."""
    total = 0.0
    for start, stop in _blocks(matrix):
        total += float((matrix[start:stop] - factors.left[start:stop] @ factors.right).double().square().sum())
    return total


def _blocks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of about a million elements."""
    rows = matrix.shape[0]
    step = max(1, (1 << 20) // matrix.shape[1])
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
