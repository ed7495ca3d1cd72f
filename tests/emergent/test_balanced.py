"""Balanced assignment and k-means against brute force, planted clusters and scipy."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from workbench.emergent.balanced import assign, balanced_kmeans, means


def least_cost(costs: torch.Tensor) -> float:
    """The least total cost of all assignments of equal size, by enumeration."""
    points, clusters = costs.shape
    slots = [c for c in range(clusters) for _ in range(points // clusters)]
    return min(float(costs[range(points), list(order)].sum()) for order in set(permutations(slots)))


@pytest.mark.parametrize("seed", range(5))
def test_assignment_has_the_least_cost(seed: int) -> None:
    costs = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed))
    members = assign(costs)
    assert torch.bincount(members, minlength=3).tolist() == [2, 2, 2]
    assert float(costs[range(6), members].sum()) == pytest.approx(least_cost(costs), abs=1e-6)


def test_greedy_assignment_is_balanced_and_near() -> None:
    """The greedy assignment costs no more than a fifth more than the exact one on random points, and is never below it."""
    points = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))
    costs = torch.cdist(points, points[:8]).square()
    exact, greedy = assign(costs), assign(costs, exact=False)
    assert torch.bincount(greedy, minlength=8).tolist() == [12] * 8
    of = [float(costs[range(96), members].sum()) for members in (exact, greedy)]
    assert of[0] <= of[1] <= 1.2 * of[0]


def test_points_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 points cannot form 3 clusters of equal size"):
        assign(torch.rand(7, 3))


@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found(seed: int) -> None:
    """Four groups around far centers, shuffled: each cluster is one group, whatever the seed of the first centers."""
    draw = torch.Generator().manual_seed(9)
    labels = torch.arange(4).repeat_interleave(10)[torch.randperm(40, generator=draw)]
    points = 5 * torch.eye(4, 8)[labels] + 0.3 * torch.randn(40, 8, generator=draw)
    members = balanced_kmeans(points, 4, seed=seed)
    assert torch.bincount(members, minlength=4).tolist() == [10] * 4
    assert len(set(zip(labels.tolist(), members.tolist(), strict=True))) == 4
    torch.testing.assert_close(means(points, members, 4)[members[0]], points[labels == labels[0]].mean(0))


def test_equal_points_are_divided() -> None:
    assert torch.bincount(balanced_kmeans(torch.ones(12, 3), 4), minlength=4).tolist() == [3] * 4
