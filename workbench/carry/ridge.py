"""Ridge maps: the linear map between the units of two models, solved on their activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.carry.assign import assignment
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

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
