"""Keys of neurons: vectors that separate a few inputs of a layer from all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.ground.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3
"""Weight of ‖k‖², for inputs with a mean squared norm of 1."""
_ROUNDS, _HALVINGS, _ADDED = 100, 20, 64


class Separator:
    """Keys that are above the margin at a few inputs, the queries, and below it at all others.

    The key k of p queries among m + p inputs minimizes, with s² the mean squared norm of all inputs,

        Σ over others of max(0, 1 + k·x)² + (m / p) Σ over queries of max(0, 1 − k·q)² + ridge · s² ‖k‖²

    The first sum is the memory loss and the second the activation loss of Huang et al. 2023, with a squared hinge in place of the
    exponential: the minimum is unique, and Newton steps reach it up to rounding because the loss is piecewise quadratic.

    Few inputs count at the minimum. So a search takes only some of them, adds the others that are furthest on the wrong side of their
    margin, and ends when there are none. It begins with those that count in the key that is below the margin at all inputs.

    Args:
        inputs: [m + p, width], each input once.
        ridge: Weight of the squared norm.

    Source:
        Keerthi and DeCoste 2005, A modified finite Newton method for fast solution of large scale linear SVMs.
    """

    @no_grad
    def __init__(self, inputs: Tensor, ridge: float = RIDGE) -> None:
        self._scale, self._ridge = inputs.double().square().sum(1).mean().sqrt(), ridge
        self._inputs = inputs.double() / self._scale
        ones = torch.ones(len(inputs)).double()
        key = self._minimum(torch.arange(min(_ADDED, len(inputs))), -ones, ones)
        self._near = (self._inputs @ key > -1).nonzero()[:, 0].tolist()

    @no_grad
    def key(self, queries: Sequence[int]) -> tuple[Tensor, float, float]:
        """Return the key [width] in float64 of some inputs, its smallest product with these, and its largest with all others."""
        chosen, signs, weights = list(queries), -torch.ones(len(self._inputs)).double(), torch.ones(len(self._inputs)).double()
        signs[chosen], weights[chosen] = 1.0, max(1.0, (len(signs) - len(chosen)) / len(chosen))
        key = self._minimum(torch.tensor(sorted({*self._near, *chosen})), signs, weights)
        products = self._inputs @ key
        return key / self._scale, float(products[chosen].min()), float(products[signs < 0].max())

    def _minimum(self, taken: Tensor, signs: Tensor, weights: Tensor) -> Tensor:
        """Return the key [width] that minimizes Σ weight · max(0, 1 − sign · k·x)² + ridge ‖k‖².

        Args:
            taken: Indices of the inputs that the search begins with.
            signs: [input] 1 or -1.
            weights: [input].
        """
        shares = torch.zeros(len(taken)).double()
        while True:
            rows = self._inputs[taken]
            shares = self._shares(rows @ rows.T, shares, signs[taken], weights[taken])
            key = rows.T @ shares
            margins = signs * (self._inputs @ key)
            margins[taken] = 1.0
            if not (missing := int((margins < 1).sum())):
                return key
            added = margins.topk(min(missing, _ADDED), largest=False).indices
            taken, shares = torch.cat((taken, added)), torch.nn.functional.pad(shares, (0, len(added)))

    def _shares(self, products: Tensor, shares: Tensor, signs: Tensor, weights: Tensor) -> Tensor:
        """Return each input's share of the key [input], which is the sum of shares times inputs, from their products and a first guess."""

        def loss(margins: Tensor, shares: Tensor) -> Tensor:
            squares = (weights * (1 - margins).clamp(min=0).square()).sum()
            return squares + self._ridge * (shares @ (products @ shares))

        margins = signs * (products @ shares)
        value = loss(margins, shares)
        for _ in range(_ROUNDS):
            below = (margins < 1).nonzero()[:, 0]
            step = -shares
            step[below] += torch.linalg.solve(
                products[below[:, None], below] + torch.diag(self._ridge / weights[below]), signs[below]
            )
            direction, length = signs * (products @ step), 1.0
            for _ in range(_HALVINGS):
                if (tried := loss(margins + length * direction, shares + length * step)) < value:
                    break
                length /= 2
            else:
                break  # no step lowers the loss by more than rounding
            shares, margins, value = shares + length * step, margins + length * direction, tried
        return shares
