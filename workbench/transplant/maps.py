"""Maps between the units of two models, fitted on their activations: signed assignment and ridge regression."""

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


PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties to choose from, relative to the mean square of a start unit."""


def input_map(start: Tensor, goal: Tensor) -> Tensor:
    """Return the map of what modules read: the ridge map around zero.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
    """
    return ridge(start, goal, centered=False)


def output_map(start: Tensor, goal: Tensor) -> Tensor:
    """Return the map of what modules write, on which updates act: the ridge map around the signed assignment.

    What a module writes spans no more directions than it has inputs, so activations do not say how the others are mapped, and an update
    may use them. There the assignment decides, with the slope of each matched pair. Updates are changes, so means do not count.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
    """
    start, goal = start - start.mean(0), goal - goal.mean(0)
    rows, columns = assignment(start, goal).nonzero(as_tuple=True)
    one, other = start[:, columns], goal[:, rows]
    slopes = torch.zeros(goal.shape[1], start.shape[1])
    slopes[rows, columns] = (one * other).sum(0) / one.square().sum(0).clamp_min(1e-30)
    return slopes + ridge(start, goal - start @ slopes.T, centered=True)


def ridge(start: Tensor, goal: Tensor, *, centered: bool) -> Tensor:
    """Return the map M that minimizes Σ ‖M start − goal‖² + λ‖M‖².

    λ is chosen among `PENALTIES`: solved on the first four fifths of the positions, the map with the smallest error on the others; it is
    then solved again on all positions.

    Args:
        start: [positions, start units].
        goal: [positions, goal units].
        centered: Whether both are taken as deviations from their means.

    Returns:
        [goal units, start units].
    """
    if centered:
        start, goal = start - start.mean(0), goal - goal.mean(0)
    split = start.shape[0] * 4 // 5
    errors = [
        float((start[split:] @ map_.T - goal[split:]).square().sum())
        for map_ in _solutions(start[:split], goal[:split], PENALTIES)
    ]
    best = PENALTIES[min(range(len(errors)), key=errors.__getitem__)]
    return _solutions(start, goal, (best,))[0]


def _solutions(start: Tensor, goal: Tensor, penalties: tuple[float, ...]) -> list[Tensor]:
    """Return the map for each penalty, from one pair of Gram matrices.

    They are summed in float64: where a few units are a thousand times as large as the others, rounding in float32 exceeds the smallest
    penalty, and the matrix is not positive definite.
    """
    start, goal = start.double(), goal.double()
    gram, cross = start.T @ start, start.T @ goal
    size = gram.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return [torch.cholesky_solve(cross, torch.linalg.cholesky(gram + penalty * size * eye)).T.float() for penalty in penalties]
