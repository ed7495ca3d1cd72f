"""Readers of rows: a model's stored values if it has them, otherwise its delta in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.weights.sparse import Rows
from workbench.weights.specs import Source, StoredSource, TensorSpec, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.merge.streaming.deltas import Deltas, DeltaSource


class Operand:
    """Row blocks of one model's tensor, in the stored dtype if it is in a file, or in float32 if it is computed."""

    def __init__(self, source: Source, spec: TensorSpec, device: torch.device) -> None:
        self._source = source
        self._stored = source if isinstance(source, StoredSource) else None
        self._cols = spec.cols
        self._computed = buffer(spec, device) if self._stored is None else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop; stored rows are not checked for NaN and infinity."""
        if self._computed is None:
            assert self._stored is not None
            return self._stored.raw(start, stop)
        block = matrix(self._computed, start, stop, self._cols)
        self._source.read(start, stop, block)
        return block

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise an error that names the first NaN or infinity of a stored tensor in rows start..stop."""
        if self._stored is not None:
            self._stored.refuse_non_finite(start, stop)


class RowReader:
    """Reader of a tensor's base and bricks: a model's stored rows if it has them, otherwise its delta in float32."""

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
        """Return rows start..stop in buffers that the next call overwrites."""
        cols = self._cols
        base = self._base.rows(start, stop)
        if self._wide is not None:
            base = matrix(self._wide, start, stop, cols).copy_(base)
        bricks: list[Tensor | None] = []
        for brick in self._bricks:
            if isinstance(brick, tuple):
                source, buffer = brick
                delta = matrix(buffer, start, stop, cols)
                source.read_delta(start, stop, base, delta)
                bricks.append(delta)
            else:
                bricks.append(brick.rows(start, stop) if brick else None)
        return Rows(base, bricks, [isinstance(brick, tuple) for brick in self._bricks])

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise an error that names the first NaN or infinity of a stored tensor in rows start..stop."""
        for operand in (self._base, *self._bricks):
            if isinstance(operand, Operand):
                operand.refuse_non_finite(start, stop)
