"""Clusters of equal size: assignment of points under a capacity, and k-means with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 2048
"""Largest number of points that are assigned at the least total cost. More points are assigned greedily."""
ITERATIONS = 10


def assign(costs: Tensor, *, exact: bool = True) -> Tensor:
    """Assign points to clusters of equal size at a low total cost.

    Args:
        costs: Cost of each point in each cluster [points, clusters]. The number of points is a multiple of the number of clusters.
        exact: Find the least total cost if there are at most `EXACT` points; otherwise assign greedily.

    Returns:
        Cluster of each point [points] int64.

    Raises:
        ValueError: If the number of points is no multiple of the number of clusters.
    """
    points, clusters = costs.shape
    if points % clusters:
        raise ValueError(f"{points} points cannot form {clusters} clusters of equal size")
    size = points // clusters
    if not exact or points > EXACT:
        return _greedy(costs, size)
    from scipy.optimize import linear_sum_assignment

    _, slots = linear_sum_assignment(costs.double().cpu().numpy().repeat(size, axis=1))
    return torch.from_numpy(slots // size)


def _greedy(costs: Tensor, size: int) -> Tensor:
    """Assign each point to its best cluster with a free place; points that would lose most by their second choice come first."""
    values = costs.double().cpu()
    order = values.argsort(dim=1, stable=True).numpy()
    two = values.sort(1).values[:, :2]
    regret = two[:, -1] - two[:, 0]
    free = np.full(costs.shape[1], size)
    clusters = np.empty(len(order), np.int64)
    for point in regret.argsort(descending=True, stable=True).tolist():
        clusters[point] = next(c for c in order[point] if free[c])
        free[clusters[point]] -= 1
    return torch.from_numpy(clusters)


def balanced_kmeans(points: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Divide points into clusters of equal size that are close to their means.

    Iterations assign greedily; the last assignment has the least total cost if there are at most `EXACT` points.

    Args:
        points: The points [points, width].
        clusters: Number of clusters, which divides the number of points.
        seed: Seed of the first centers, which are drawn far apart (k-means++).

    Returns:
        Cluster of each point [points] int64.

    Raises:
        ValueError: If the number of points is no multiple of the number of clusters.
    """
    values = points.float()
    centers = _first_centers(values, clusters, seed)
    members = assign(_squared(values, centers), exact=False)
    for _ in range(ITERATIONS):
        centers = means(values, members, clusters)
        moved = assign(_squared(values, centers), exact=False)
        if torch.equal(moved, members):
            break
        members = moved
    return assign(_squared(values, means(values, members, clusters)))


def means(points: Tensor, members: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster [clusters, width]; every cluster has at least one point."""
    sums = points.new_zeros(clusters, points.shape[1]).index_add_(0, members, points)
    result: Tensor = sums / torch.bincount(members, minlength=clusters)[:, None]
    return result


def _squared(points: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances [points, centers]."""
    return points.square().sum(1, keepdim=True) - 2 * points @ centers.T + centers.square().sum(1)


def _first_centers(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Draw points as centers, each with a probability proportional to its squared distance to the nearest earlier one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = _squared(points, points[chosen])[:, 0].clamp_min(0)
    while len(chosen) < clusters:
        weights = nearest if float(nearest.sum()) > 0 else torch.ones(len(points))
        chosen.append(int(torch.multinomial(weights.cpu(), 1, generator=generator)))
        nearest = torch.minimum(nearest, _squared(points, points[chosen[-1:]])[:, 0].clamp_min(0))
    return points[chosen]
