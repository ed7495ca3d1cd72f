"""Signed assignment: each unit of one model stands for one unit of the other, or for its negative."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.carry.correlation import correlations
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def assignment(start: Tensor, goal: Tensor) -> Tensor:
    """Return the signed assignment of units with the largest sum of |correlation|, as a map from start to goal.

    If the models have different numbers of units, those that are left over are matched with none: their row or column is zero.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].

    Returns:
        [goal units, start units] with at most one entry, 1 or −1, in each row and column.

    Source:
        Klimaszewski et al. 2024, Is Modularity Transferable?, arXiv 2403.18804, section 3.2. There the largest signed correlations are
        matched; here their magnitudes, and the sign is kept.
    """
    from scipy.optimize import linear_sum_assignment

    found = correlations(goal, start)
    rows, columns = linear_sum_assignment(-found.abs().double().numpy())
    map_ = torch.zeros_like(found)
    map_[rows, columns] = torch.where(found[rows, columns] < 0, -1.0, 1.0)
    return map_
