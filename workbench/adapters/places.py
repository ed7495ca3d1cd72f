"""Mapping from the live tensor names that an adapter uses to the base's tensors on disk and parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.models.architecture import is_conv1d_layer, is_head_module
from workbench.models.names import with_and_without_root
from workbench.models.placement import LiveLayout, Piece, live_layout
from workbench.models.tied import tied_embeddings
from workbench.weights.specs import TensorSpec


@dataclass(frozen=True)
class Spot:
    """A part of a live tensor that one tensor on disk stores.

    Attributes:
        disk: Name of the tensor on disk.
        row: First row of the part in the 2-D view of the tensor on disk.
        col: First column of the part in that view.
        expert: Index along the live tensor's first dimension; None for a matrix or vector.
        rows: Rows (start, stop) of the live matrix, or of that expert's matrix.
        cols: Columns (start, stop) of the same matrix.
        swap: Whether the tensor on disk holds the transpose.
    """

    disk: str
    row: int
    col: int
    expert: int | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    swap: bool


class Places:
    """Locations of live tensors on disk.

    Args:
        specs: The base's tensors.
        config: The base's config.json; without it, only tensors with the same name on disk are found.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> None:
        self.specs = specs
        self.config = config
        self.tied = tied_embeddings(specs, config) if config is not None else None

    @cached_property
    def layout(self) -> LiveLayout | None:
        """Layout of the model in transformers, used for names that the disk does not have."""
        return live_layout(self.specs, self.config) if self.config is not None else None

    def direct(self, name: str) -> str | None:
        """Return the tensor on disk of the same name, with or without the root prefix."""
        return next((n for n in with_and_without_root(name) if n in self.specs), None)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return the pieces of a live tensor, or nothing if the disk does not store it."""
        if disk := self.direct(name):
            shape = self.specs[disk].shape
            zero = (0,) * len(shape)
            return (Piece(disk, zero, shape, tuple(range(len(shape))), zero),)
        if self.layout is None:
            return ()
        return next((self.layout.pieces[n] for n in with_and_without_root(name) if n in self.layout.pieces), ())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a live tensor, or None if it is not known."""
        if disk := self.direct(name):
            return self.specs[disk].shape
        if self.layout is None:
            return None
        return next((self.layout.shapes[n] for n in with_and_without_root(name) if n in self.layout.shapes), None)

    def spots(self, name: str) -> list[Spot]:
        """Return the parts of a live tensor, one per expert, or nothing if the disk does not store it in a supported order."""
        spots = []
        for piece in self.pieces(name):
            disk = self.specs[piece.disk].shape
            if len(piece.size) == 1:
                spots.append(Spot(piece.disk, piece.disk_start[0], 0, None, _span(piece, 0), (0, 1), False))
                continue
            first, second = piece.axes[-2:]
            if first is None or second is None or sorted((first, second)) != [len(disk) - 2, len(disk) - 1]:
                return []
            low, high = sorted((first, second))
            row, col = piece.disk_start[low], piece.disk_start[high]
            if len(piece.size) == 2:
                spots.append(Spot(piece.disk, row, col, None, _span(piece, 0), _span(piece, 1), first > second))
                continue
            for step in range(piece.size[0]):
                above = (piece.disk_start[0] + step) * disk[1] if len(disk) == 3 else 0
                spots.append(
                    Spot(piece.disk, above + row, col, piece.start[0] + step, _span(piece, 1), _span(piece, 2), first > second)
                )
        return spots

    def whole(self, name: str) -> str | None:
        """Return the tensor on disk that stores exactly one whole live tensor, or None if it is split, fused or absent."""
        pieces = self.pieces(name)
        if len(pieces) != 1:
            return None
        piece = pieces[0]
        is_complete = piece.size == self.specs[piece.disk].shape and piece.axes == tuple(range(len(piece.size)))
        return piece.disk if is_complete else None

    def parameters(self, module: str) -> list[str]:
        """Return the parameters directly in a live module, in the model's order, or the file's if transformers has no such model."""
        for tensors in (self.layout.shapes if self.layout else {}, self.specs):
            for root in with_and_without_root(module):
                names = [n for n in tensors if n.startswith(f"{root}.") and "." not in n[len(root) + 1 :]]
                if names:
                    return names
        return []

    def stores_in_out(self, module: str, update: tuple[int, int], stored: tuple[int, ...], flag: bool) -> bool | None:
        """Return whether a layer's weight is stored as [in, out], or None if the update fits neither orientation.

        Shapes and the model type decide. PEFT's flag describes only the last layer that it wrapped, so it counts only for a
        square weight of an unknown model type.

        Args:
            module: Name of the layer.
            update: Shape of the update, (out, in).
            stored: Shape of the weight.
            flag: The adapter's `fan_in_fan_out`.
        """
        if stored not in (update, update[::-1]):
            return None
        return stored != update if update[0] != update[1] else self.is_conv1d(module, flag)

    def is_conv1d(self, module: str, flag: bool) -> bool:
        """Return whether a layer is transformers' Conv1D, or `flag` if the model type is not known."""
        if self.config is None:
            return flag
        return is_conv1d_layer(self.config, module)

    def stores_experts_in_out(self, module: str) -> bool:
        """Return whether a live module of stacked experts stores them as [in, out]."""
        return self.layout is not None and any(n in self.layout.transposed for n in with_and_without_root(module))

    def is_tied_head(self, name: str) -> bool:
        """Return whether a live weight is the head that the base ties to its embeddings."""
        return self.tied is not None and is_head_module(name.removesuffix(".weight")) and not self.direct(name)


def _span(piece: Piece, dim: int) -> tuple[int, int]:
    return piece.start[dim], piece.start[dim] + piece.size[dim]
