"""The mixing kernel: a weighted sum of the low-rank updates of several bricks, from concatenated factors.

Brick i updates a module by B_i A_i, with A_i [rank_i, in] and B_i [out, rank_i]. With weights w_i,

    delta(x) = sum_i w_i B_i A_i x = B_cat (w * (A_cat x)),   A_cat = [A_1; A_2; ...],   B_cat = [B_1, B_2, ...],

where w repeats each weight over the ranks of its brick. The intermediate result has one number for each token and rank, so ranks may
differ, and a brick without an update of the module has rank 0. A stack of the bricks' outputs, as in PEFT's Arrow, has `out` numbers
for each token and brick instead.

Only bricks with a weight other than zero are computed, and only rows that have such a brick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple["Tensor", "Tensor"]
"""Factors of one brick's update of one module: A [rank, in] and B [out, rank], with the scaling in either of them."""


@dataclass(frozen=True)
class Mix:
    """Weights of the bricks in one forward pass.

    Attributes:
        weights: float32; [bricks] for all rows, [rows, bricks], or [rows, tokens, bricks], of the rows in `rows`.
        active: Bricks with a weight other than zero, in order.
        count: Number of rows of the batch; None if the weights hold for any batch.
        rows: Indices of the rows with such a weight; None for all rows.
        joined: Factors and weights by module, gathered when the module is first used.
    """

    weights: Tensor
    active: tuple[int, ...]
    count: int | None = None
    rows: Tensor | None = None
    joined: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, weights: Tensor) -> Mix | None:
        """Return the mix with some weights; None if all weights are zero, so that the base acts alone.

        Args:
            weights: [bricks], [rows, bricks] or [rows, tokens, bricks].

        Raises:
            WorkbenchError: If a weight is NaN or infinite, or the tensor has another number of dimensions.
        """
        weights = weights.detach().float()
        if not 1 <= weights.dim() <= 3 or not bool(weights.isfinite().all()):
            raise WorkbenchError(
                f"weights of bricks: expected finite numbers [bricks], [rows, bricks] or [rows, tokens, bricks], "
                f"found {list(weights.shape)} with {int((~weights.isfinite()).sum())} NaN or infinite numbers",
                "The router's scores overflowed, or the weights were made by hand.",
            )
        used = weights != 0
        active = tuple(used.reshape(-1, used.shape[-1]).any(0).nonzero()[:, 0].tolist())
        if not active:
            return None
        if weights.dim() == 1:
            return cls(weights, active)
        acts = used.reshape(len(used), -1).any(1)
        if bool(acts.all()):
            return cls(weights, active, len(weights))
        rows = acts.nonzero()[:, 0]
        return cls(weights[rows], active, len(weights), rows)


class StackedFactors:
    """The factors of all bricks for one module, concatenated over ranks.

    Args:
        pairs: For each brick, its factors, or None if it does not update the module. At least one brick does.

    Attributes:
        ranks: Rank of each brick's update.
    """

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        self.ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        self._starts = [0, *accumulate(self.ranks)]
        present = [pair for pair in pairs if pair is not None]
        self._a = torch.cat([a.float() for a, _ in present]).contiguous()  # [ranks, in]
        self._b = torch.cat([b.float().T for _, b in present]).contiguous()  # [ranks, out]

    @property
    def nbytes(self) -> int:
        """Memory of the factors in bytes."""
        return int(self._a.nbytes + self._b.nbytes)

    def add(self, output: Tensor, inputs: Tensor, mix: Mix) -> Tensor:
        """Return a module's output plus the weighted updates of the bricks, in the output's dtype.

        Args:
            output: [..., out], with the rows of `mix` first; some models flatten rows and tokens into one dimension.
            inputs: [..., in], with the same leading dimensions.
            mix: The weights.
        """
        if inputs.device != self._a.device:
            self._a, self._b = self._a.to(inputs.device), self._b.to(inputs.device)
        a, b, scale = self._chosen(mix)
        if not len(a):
            return output
        count = mix.count or 1
        x, y = (part.reshape(count, -1, part.shape[-1]) for part in (inputs, output))
        if mix.rows is None:
            return _sum(y, _product(x, a, b, scale)).view_as(output)
        rows = mix.rows.to(inputs.device)
        total = y.clone()
        total[rows] = _sum(y[rows], _product(x[rows], a, b, scale))
        return total.view_as(output)

    def _chosen(self, mix: Mix) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A [ranks, in], B [ranks, out] and the weights of the ranks of the active bricks.

        Weights have the shape [1, ranks], [rows, 1, ranks] or [rows, tokens, ranks]; None stands for 1 everywhere.
        """
        known = mix.joined.get(id(self))
        if known is not None and known[0].device == self._a.device:
            return known
        active = [brick for brick in mix.active if self.ranks[brick]]
        spans = _spans([(self._starts[brick], self._starts[brick + 1]) for brick in active])
        a, b = (
            part[slice(*spans[0])] if len(spans) == 1 else torch.cat([part[start:stop] for start, stop in spans] or [part[:0]])
            for part in (self._a, self._b)
        )
        columns = torch.tensor([brick for brick in active for _ in range(self.ranks[brick])], dtype=torch.long)
        scale: Tensor | None = mix.weights.to(self._a.device)[..., columns.to(self._a.device)]
        assert scale is not None
        scale = scale[:, None] if scale.dim() == 2 else scale
        mix.joined[id(self)] = (a, b, None if bool((scale == 1).all()) else scale)
        return mix.joined[id(self)]


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that follow each other."""
    spans: list[tuple[int, int]] = []
    for start, stop in ranges:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans


def _product(x: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
    """Return the update [rows, tokens, out] in float32."""
    hidden = torch.nn.functional.linear(x.float(), a)
    return (hidden if scale is None else hidden * scale) @ b


def _sum(output: Tensor, update: Tensor) -> Tensor:
    """Add a float32 update to an output, rounding once."""
    return (output + update).to(output.dtype)
