"""Pearson correlations of units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_CONSTANT = 1e-6  # deviation, relative to the mean, below which a unit counts as constant


def standardized(values: Tensor) -> Tensor:
    """Return columns with mean 0 and norm 1, and columns of zeros for units that are constant.

    Args:
        values: [positions, units].
    """
    mean = values.mean(0)
    centered = values - mean
    norm = centered.norm(dim=0)
    varies = norm > _CONSTANT * (mean.abs() + 1e-30) * values.shape[0] ** 0.5
    return torch.where(varies, centered / norm.clamp_min(1e-30), torch.zeros(()))


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlation of each unit with each other one [first units, second units]; 0 for units that are constant.

    Args:
        first: [positions, first units].
        second: [positions, second units].
    """
    return standardized(first).T @ standardized(second)


def matched(map_: Tensor | None, start: Tensor, goal: Tensor) -> Tensor:
    """Return the correlation of each unit of the goal with what a map gives for it, leaving out units that are constant on either side.

    Args:
        map_: [goal units, start units]; None is the identity.
        start: [positions, start units].
        goal: [positions, goal units].
    """
    given = standardized(start if map_ is None else start @ map_.T)
    wanted = standardized(goal)
    varies = (given.abs().amax(0) > 0) & (wanted.abs().amax(0) > 0)
    return (given * wanted).sum(0)[varies]
