"""Source of a `Selection`: sparsified deltas that are summed or elected, in one pass over the stored rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.weights.sparse import Rows, Selection, Trim, select
from workbench.weights.specs import Source, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.merge.streaming.group import TensorGroup


class SelectionSource:
    """One tensor of θ₀ + selection, or of the selection on other weights. Must be read in order, from the start."""

    def __init__(self, group: TensorGroup, selection: Selection, current: Source | None) -> None:
        self._group, self._selection, self._current = group, selection, current
        self._left: list[int] = []
        self._scratch = buffer(group.spec, group.device) if current else None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop in float32."""
        if start == 0:
            self._left = ties_of(self._selection)
        index = start * self._group.spec.cols
        rows = self._group.rows(start, stop)
        if not select(rows, self._selection, self._left, index, self._current is None, out):
            self._group.refuse_non_finite(start, stop)
        if self._current is not None and self._scratch is not None:
            scratch = matrix(self._scratch, start, stop, self._group.spec.cols)
            self._current.read(start, stop, scratch)
            out.add_(scratch)


def ties_of(selection: Selection) -> list[int]:
    """Return the number of ties of every trim, before the first block."""
    return [thin.ties if isinstance(thin, Trim) else 0 for thin in selection.thin]


def selected(selection: Selection, deltas: list[Tensor]) -> Tensor:
    """Apply a selection to whole deltas in memory [rows, cols], in float32."""
    out = torch.empty_like(deltas[0])
    select(Rows(None, list(deltas), [True] * len(deltas)), selection, ties_of(selection), 0, False, out)
    return out
