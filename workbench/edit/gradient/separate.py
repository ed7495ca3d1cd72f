"""Keys that separate a query from other inputs by a margin: an exact minimum of squared hinge losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3
"""Weight of ‖k‖², for inputs with a mean squared norm of 1."""
_ROUNDS, _HALVINGS = 100, 20


@no_grad
def separating(queries: Tensor, others: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the key k that is above the margin at queries and below it at other inputs.

    It minimizes, with s² the mean squared norm of all inputs, m other inputs and p queries,

        Σ over others of max(0, 1 + k·x)² + (m / p) Σ over queries of max(0, 1 − k·q)² + ridge · s² ‖k‖²

    The first sum is the memory loss and the second the activation loss of Huang et al. 2023, with a squared hinge in place of the
    exponential: the minimum is unique, and Newton steps reach it up to rounding because the loss is piecewise quadratic.

    Args:
        queries: [p, width].
        others: [m, width]; at least one.
        ridge: Weight of the squared norm.

    Returns:
        The key [width], float64.

    Source:
        Keerthi and DeCoste 2005, A modified finite Newton method for fast solution of large scale linear SVMs.
    """
    inputs = torch.cat((queries, others)).double()
    scale = inputs.square().sum(1).mean().sqrt()
    signs = torch.cat((torch.ones(len(queries)), -torch.ones(len(others)))).double()
    weights = torch.cat((torch.full((len(queries),), max(1.0, len(others) / len(queries))), torch.ones(len(others)))).double()
    signed = inputs / scale * signs[:, None]  # the margin is 1 for every row

    def loss(key: Tensor) -> Tensor:
        return (weights * (1 - signed @ key).clamp(min=0).square()).sum() + ridge * key.square().sum()

    key = torch.zeros(inputs.shape[1], dtype=torch.float64)
    value = loss(key)
    for _ in range(_ROUNDS):
        below = signed @ key < 1
        rows, weight = signed[below], weights[below]
        normal = rows.T @ (weight[:, None] * rows)
        normal.diagonal().add_(ridge)
        step = torch.linalg.solve(normal, rows.T @ weight) - key
        length = 1.0
        for _ in range(_HALVINGS):
            if (tried := loss(key + length * step)) < value:
                break
            length /= 2
        else:
            break  # no step lowers the loss by more than rounding
        key, value = key + length * step, tried
    return key / scale
