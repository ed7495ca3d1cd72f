"""Reads a `Selection`: deltas that are thinned out, then summed or elected, in one pass over the rows as they lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.merge.combination import Operand
from workbench.weights.sparse import Rows, Selection, Trim, select
from workbench.weights.specs import Source, TensorSpec, buffer, matrix

if TYPE_CHECKING:
    from workbench.merge.stream import Deltas, DeltaSource, TensorGroup


class RowReader:
    """A tensor's base and bricks as they lie: a model's own rows where it has them, the delta in float32 where it has not."""

    def __init__(self, tensor: str, spec: TensorSpec, base: Source, bricks: Iterable[Deltas], device: torch.device) -> None:
        self._cols = spec.cols
        self._base = Operand(base, spec, device)
        self._bricks: list[Operand | tuple[DeltaSource, Tensor] | None] = []
        for brick in bricks:
            if not brick.touches(tensor):
                self._bricks.append(None)
            elif model := brick.open_model(tensor, device):
                self._bricks.append(Operand(model, spec, device))
            else:
                self._bricks.append((brick.open_delta(tensor, device), buffer(spec, device)))
        self._wide = buffer(spec, device) if any(isinstance(b, tuple) for b in self._bricks) else None

    def read(self, start: int, stop: int) -> Rows:
        """Rows start..stop; the next call overwrites them."""
        cols = self._cols
        base = self._base.rows(start, stop)
        if self._wide is not None:
            base = matrix(self._wide, start, stop, cols).copy_(base)
        found: list[Tensor | None] = []
        for brick in self._bricks:
            if isinstance(brick, tuple):
                source, room = brick
                delta = matrix(room, start, stop, cols)
                source.read_delta(start, stop, base, delta)
                found.append(delta)
            else:
                found.append(brick.rows(start, stop) if brick else None)
        return Rows(base, found, [isinstance(brick, tuple) for brick in self._bricks])

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Name the first NaN or infinity of a stored tensor."""
        for operand in (self._base, *self._bricks):
            if isinstance(operand, Operand):
                operand.refuse_non_finite(start, stop)


class SelectionSource:
    """One tensor of θ₀ + selection, or of the selection on other weights. To be read from its start, in order."""

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
    """Every trim's ties, before the first block."""
    return [thin.ties if isinstance(thin, Trim) else 0 for thin in selection.thin]


def selected(selection: Selection, deltas: list[Tensor]) -> Tensor:
    """The selection of whole deltas in memory [rows, cols]; float32."""
    out = torch.empty_like(deltas[0])
    select(Rows(None, list(deltas), [True] * len(deltas)), selection, ties_of(selection), 0, False, out)
    return out
