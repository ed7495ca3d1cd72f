"""Keep sums and Grams of each brick's hidden states, which add up over prompts, and solve routers from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Count, sum and Gram of vectors.

    The Gram [d, d] is kept as a root R with RᵀR = Gram, which has as many rows as there are vectors, at most d: for 64 prompts and
    d = 4096, 2 MB instead of 134 MB.

    Attributes:
        count: Number of vectors.
        total: [d], float64, their sum.
        root: [rows, d], float64.
    """

    count: int
    total: Tensor
    root: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Statistics:
        """Return the statistics of vectors [n, d]."""
        vectors = vectors.double()
        return cls(len(vectors), vectors.sum(0), _reduced(vectors))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], prefix: str) -> Statistics:
        """Return the statistics from the tensors of a file; see `tensors`."""
        return cls(int(tensors[f"{prefix}count"][0]), tensors[f"{prefix}total"], tensors[f"{prefix}root"])

    @property
    def mean(self) -> Tensor:
        """The mean [d]."""
        return self.total / self.count

    @property
    def gram(self) -> Tensor:
        """The sum of the vectors' outer products, [d, d]."""
        return self.root.T @ self.root

    @property
    def covariance(self) -> Tensor:
        """The covariance [d, d]."""
        return self.gram / self.count - torch.outer(self.mean, self.mean)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.count + other.count, self.total + other.total, _reduced(torch.cat([self.root, other.root])))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the statistics as tensors for a file, under names that begin with `prefix`."""
        count = torch.tensor([self.count], dtype=torch.int64)
        return {f"{prefix}count": count, f"{prefix}total": self.total, f"{prefix}root": self.root.contiguous()}


@dataclass(frozen=True)
class Scatter:
    """Centers and scatter of bricks, in which each brick counts as much as any other, however many prompts it has.

    Attributes:
        centre: [d], the mean of the bricks' means.
        means: [bricks, d], relative to the centre.
        total: [d, d], the mean over bricks of the mean outer product around the centre.
    """

    centre: Tensor
    means: Tensor
    total: Tensor

    @classmethod
    def of(cls, statistics: Sequence[Statistics]) -> Scatter:
        """Return the scatter of bricks with these statistics."""
        means = torch.stack([part.mean for part in statistics])
        centre = means.mean(0)
        total = -torch.outer(centre, centre)
        for part in statistics:
            total += part.gram / (part.count * len(statistics))
        return cls(centre, means - centre, total)

    @property
    def within(self) -> Tensor:
        """The mean covariance of a brick's vectors around the brick's own mean, [d, d]."""
        return self.total - self.means.T @ self.means / len(self.means)


def shrunk(covariance: Tensor, share: float, least: float = 0.0) -> Tensor:
    """Return (1 − share)·covariance + share·v·I, which can be inverted; v is the mean variance, or `least` if that is larger."""
    scaled: Tensor = (1 - share) * covariance
    scaled.diagonal().add_(share * max(float(covariance.trace()) / len(covariance), least))
    return scaled


def solve(scatter: Scatter, strength: float) -> Tensor:
    """Return the map [hidden size, bricks] that minimizes the squared error to one-hot targets plus the penalty.

    Every brick has the same total weight. With S = scatter.total, the mean outer product around the center μ, and one-hot targets y,
    the normal equations are (S + λ·tr(S)/d·I) W = mean of (x − μ) yᵀ = means / bricks.
    """
    matrix = scatter.total.clone()
    size = len(matrix)
    matrix.diagonal().add_(strength * scatter.total.trace() / size)
    solution: Tensor = torch.linalg.solve(matrix, scatter.means.T / len(scatter.means))
    return solution


def by_brick(vectors: Tensor, labels: Tensor, bricks: int) -> list[Statistics]:
    """Return the statistics of each brick's vectors.

    Args:
        vectors: [n, d].
        labels: [n], the brick of each vector.
        bricks: Number of bricks.
    """
    return [Statistics.of(vectors[labels == brick]) for brick in range(bricks)]


def _reduced(rows: Tensor) -> Tensor:
    """Return a matrix with the same Gram and at most as many rows as columns."""
    if len(rows) <= rows.shape[1]:
        return rows
    triangle: Tensor = torch.linalg.qr(rows, mode="r").R
    return triangle


def cosines(centre: Tensor, means: Tensor, vectors: Tensor) -> Tensor:
    """Return cosines [n, bricks] of vectors [n, d] and of the bricks' means [bricks, d], which are relative to the center [d]."""
    near = torch.nn.functional.normalize(vectors.double() - centre, dim=1)
    return near @ torch.nn.functional.normalize(means, dim=1).T
