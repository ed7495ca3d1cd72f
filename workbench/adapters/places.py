"""Live tensor names of an adapter to the base's tensors on disk, and to the parts of them."""

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
    """A part of a live tensor that lies in one tensor on disk.

    Attributes:
        disk: The tensor on disk.
        row, col: Where the part starts in its row view.
        expert: Index along the live tensor's first dimension; None for a matrix or vector.
        rows, cols: The part of the live matrix (of that expert).
        swap: Whether the tensor on disk holds its transpose.
    """

    disk: str
    row: int
    col: int
    expert: int | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    swap: bool


class Places:
    """Where live tensors lie on disk.

    Args:
        specs: The base's tensors.
        config: Its config.json; without it only names that the disk has are found.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> None:
        self.specs = specs
        self.config = config
        self.tied = tied_embeddings(specs, config) if config is not None else None

    @cached_property
    def layout(self) -> LiveLayout | None:
        """transformers' view, asked for where the disk does not have a name."""
        return live_layout(self.specs, self.config) if self.config is not None else None

    def direct(self, name: str) -> str | None:
        """The tensor on disk of the same name, root prefix added or left out."""
        return next((n for n in with_and_without_root(name) if n in self.specs), None)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The pieces of a live tensor; none where it has no place."""
        if found := self.direct(name):
            shape = self.specs[found].shape
            zero = (0,) * len(shape)
            return (Piece(found, zero, shape, tuple(range(len(shape))), zero),)
        if self.layout is None:
            return ()
        return next((self.layout.pieces[n] for n in with_and_without_root(name) if n in self.layout.pieces), ())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a live tensor."""
        if found := self.direct(name):
            return self.specs[found].shape
        if self.layout is None:
            return None
        return next((self.layout.shapes[n] for n in with_and_without_root(name) if n in self.layout.shapes), None)

    def spots(self, name: str) -> list[Spot]:
        """The parts of a live tensor, an expert at a time; none where it has no place or lies there in another order."""
        found = []
        for piece in self.pieces(name):
            disk = self.specs[piece.disk].shape
            if len(piece.size) == 1:
                found.append(Spot(piece.disk, piece.disk_start[0], 0, None, _span(piece, 0), (0, 1), False))
                continue
            first, second = piece.axes[-2:]
            if first is None or second is None or sorted((first, second)) != [len(disk) - 2, len(disk) - 1]:
                return []
            low, high = sorted((first, second))
            row, col = piece.disk_start[low], piece.disk_start[high]
            if len(piece.size) == 2:
                found.append(Spot(piece.disk, row, col, None, _span(piece, 0), _span(piece, 1), first > second))
                continue
            for step in range(piece.size[0]):
                above = (piece.disk_start[0] + step) * disk[1] if len(disk) == 3 else 0
                found.append(
                    Spot(piece.disk, above + row, col, piece.start[0] + step, _span(piece, 1), _span(piece, 2), first > second)
                )
        return found

    def whole(self, name: str) -> str | None:
        """The tensor on disk that is a live tensor, all of it and nothing else."""
        pieces = self.pieces(name)
        if len(pieces) != 1:
            return None
        piece = pieces[0]
        same = piece.size == self.specs[piece.disk].shape and piece.axes == tuple(range(len(piece.size)))
        return piece.disk if same else None

    def parameters(self, module: str) -> list[str]:
        """Parameters that a live module holds itself, in the model's order; in the file's where transformers knows no model."""
        for known in (self.layout.shapes if self.layout else {}, self.specs):
            for root in with_and_without_root(module):
                found = [n for n in known if n.startswith(f"{root}.") and "." not in n[len(root) + 1 :]]
                if found:
                    return found
        return []

    def stores_in_out(self, module: str, update: tuple[int, int], stored: tuple[int, ...], flag: bool) -> bool | None:
        """Whether a layer's weight is stored as [in, out]; None where the update fits neither way.

        The flag `fan_in_fan_out` of an adapter is that of the last layer that PEFT wrapped, so shapes and the model's type
        decide; it counts only for a square weight of a model of unknown type.
        """
        if stored not in (update, update[::-1]):
            return None
        return stored != update if update[0] != update[1] else self.is_conv1d(module, flag)

    def is_conv1d(self, module: str, flag: bool) -> bool:
        """Whether a layer is transformers' Conv1D; the adapter's flag where the model's type is not known."""
        if self.config is None:
            return flag
        return is_conv1d_layer(self.config, module)

    def stores_experts_in_out(self, module: str) -> bool:
        """Whether a live module of stacked experts stores them as [in, out]."""
        return self.layout is not None and any(n in self.layout.transposed for n in with_and_without_root(module))

    def is_tied_head(self, name: str) -> bool:
        """Whether a live weight is the head that the base ties to its embeddings."""
        return self.tied is not None and is_head_module(name.removesuffix(".weight")) and not self.direct(name)


def _span(piece: Piece, dim: int) -> tuple[int, int]:
    return piece.start[dim], piece.start[dim] + piece.size[dim]
