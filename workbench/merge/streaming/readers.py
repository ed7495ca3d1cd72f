"""Readers of stored rows: a model's own numbers where it has them, the delta in float32 where it has not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.weights.sparse import Rows
from workbench.weights.specs import Source, StoredSource, TensorSpec, buffer, matrix

if TYPE_CHECKING:
    from workbench.merge.streaming.deltas import Deltas, DeltaSource


class Operand:
    """Blocks of one model's tensor: as stored where it lies in a file, in float32 where it is computed."""

    def __init__(self, source: Source, spec: TensorSpec, device: torch.device) -> None:
        self._source = source
        self._stored = source if isinstance(source, StoredSource) else None
        self._cols = spec.cols
        self._computed = buffer(spec, device) if self._stored is None else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, unchecked if stored."""
        if self._computed is None:
            assert self._stored is not None
            return self._stored.raw(start, stop)
        block = matrix(self._computed, start, stop, self._cols)
        self._source.read(start, stop, block)
        return block

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Name the first NaN or infinity of a stored tensor."""
        if self._stored is not None:
            self._stored.refuse_non_finite(start, stop)


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
