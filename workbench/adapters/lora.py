"""LoRA updates as exact low-rank products: where a live tensor lies on disk, whole, in slices of fused weights, or in stacks of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from workbench.adapters.keys import Stored
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d_layer, is_head_module, tied_embeddings, with_and_without_root
from workbench.models.layout import LiveLayout, Piece, live_layout
from workbench.weights.kernels import KINDS, product
from workbench.weights.lowrank import Factors, LowRankSource
from workbench.weights.specs import NUMPY, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


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

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, object] | None) -> None:
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

    def _as_stored(self, name: str) -> str | None:
        """Return the tensor on disk of the same name and order; files of the same names may hold the transposes of a stack of experts."""
        disk = self.direct(name)
        if disk is None or len(self.specs[disk].shape) != 3 or self.layout is None:
            return disk
        return (
            disk
            if next(
                (
                    self.layout.shapes[n] == self.specs[disk].shape and self.layout.pieces[n][0].axes == (0, 1, 2)
                    for n in with_and_without_root(name)
                    if n in self.layout.pieces
                ),
                True,
            )
            else None
        )

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return the pieces of a live tensor, or nothing if the disk does not store it."""
        if disk := self._as_stored(name):
            shape = self.specs[disk].shape
            zero = (0,) * len(shape)
            return (Piece(disk, zero, shape, tuple(range(len(shape))), zero),)
        if self.layout is None:
            return ()
        return next((self.layout.pieces[n] for n in with_and_without_root(name) if n in self.layout.pieces), ())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a live tensor, or None if it is not known."""
        if disk := self._as_stored(name):
            return self.specs[disk].shape
        if self.layout is None:
            return None
        return next((self.layout.shapes[n] for n in with_and_without_root(name) if n in self.layout.shapes), None)

    def spots(self, name: str) -> list[Spot]:
        """Return the parts of a live tensor, one per expert, or nothing if the disk does not store it in a supported order."""
        spots = []
        if len(self.shape(name) or ()) > 3:  # a convolution's kernel: in the row view, all its dimensions but the last are rows
            kernel = self.whole(name)
            spec = self.specs[kernel] if kernel else None
            return [Spot(kernel, 0, 0, None, (0, spec.rows), (0, spec.cols), False)] if kernel and spec else []
        for piece in self.pieces(name):
            disk = self.specs[piece.disk].shape
            if len(piece.size) < 2:
                rows = _span(piece, 0) if piece.size else (0, 1)
                spots.append(Spot(piece.disk, sum(piece.disk_start), 0, None, rows, (0, 1), False))
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


Range = tuple[int, int]


@dataclass(frozen=True)
class FactorPair:
    """The two factors of one module, and a selected part of their product.

    Attributes:
        a: [rank, in], with experts stacked along rank; [rank, vocabulary] for embeddings.
        b: [out, rank], with experts interleaved along rank; [width, rank] for embeddings.
        scale: alpha / rank, or alpha / √rank for rsLoRA.
        flip: Whether the weight is stored as [in, out]: Conv1D, embeddings, transposed experts.
        expert: (index, number of experts) of a stacked parameter.
        rows: Selected rows of the stored weight, before `swap`; None selects all.
        cols: Selected columns of the stored weight, before `swap`; None selects all.
        swap: Whether the tensor on disk is the transpose of that part.
        singular_values: AdaLoRA's singular values, [rank, 1], which scale the rank dimension.
    """

    a: Stored
    b: Stored
    scale: float
    flip: bool = False
    expert: tuple[int, int] | None = None
    rows: Range | None = None
    cols: Range | None = None
    swap: bool = False
    singular_values: Stored | None = None

    @property
    def rank(self) -> int:
        """Rank of the update of one weight, or of one expert."""
        return self.a.shape[0] // (self.expert[1] if self.expert else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the selected part on disk."""
        whole = self.a.shape[-1], self.b.shape[0]
        (top, bottom), (first, last) = (
            span or (0, size) for span, size in zip((self.rows, self.cols), whole if self.flip else whole[::-1], strict=True)
        )
        return (last - first, bottom - top) if self.swap else (bottom - top, last - first)

    def takes_arrays(self) -> bool:
        """Return True if the factors can be read without torch: two stored factors of one weight."""
        stored = {factor.entry.spec.stored for factor in (self.a, self.b)}
        return self.expert is None and self.singular_values is None and stored <= KINDS.keys()

    def factors(self, device: torch.device | None = None) -> Factors:
        """Read the factors of the selected part as float32, scale included.

        Args:
            device: `NUMPY` for arrays, which takes factors of whole weights without singular values; otherwise tensors on the CPU.

        Raises:
            WorkbenchError: If a factor holds NaN or infinity.
        """
        if self.expert:
            index, count = self.expert
            right = self.a.rows(index * self.rank, (index + 1) * self.rank)
            left = self.b.columns(index, count)
        else:
            memory = NUMPY if device is NUMPY else None
            right, left = self.a.read(memory), self.b.read(memory)
        right = right * self.singular_values.read().reshape(-1, 1) if self.singular_values else right
        factors = Factors(left, right * self.scale)
        factors = factors.transposed() if self.flip else factors
        rows, cols = self.rows or (0, factors.left.shape[0]), self.cols or (0, factors.right.shape[1])
        factors = Factors(factors.left[slice(*rows)], factors.right[:, slice(*cols)].contiguous())
        return factors.transposed() if self.swap else factors


@dataclass(frozen=True)
class Patch:
    """The product of a pair and its position in a tensor's 2-D view."""

    pair: FactorPair
    row: int = 0
    col: int = 0


@dataclass(frozen=True)
class LowRank:
    """The update of a tensor as one or more low-rank patches."""

    spec: TensorSpec
    patches: list[Patch] = field(default_factory=list)

    def factors(self, device: torch.device) -> Factors | None:
        """Return one product for the whole matrix, or None for a stack of experts."""
        if len(self.spec.shape) != 2:
            return None
        rows, cols = self.spec.rows, self.spec.cols
        lefts, rights = [], []
        for patch in self.patches:
            part = patch.pair.factors(device)
            height, width = part.left.shape[0], part.right.shape[1]
            lefts.append(part.left if height == rows else _embed(part.left, (rows, part.rank), patch.row, 0))
            rights.append(part.right if width == cols else _embed(part.right, (part.rank, cols), 0, patch.col))
        left = lefts[0] if len(lefts) == 1 else torch.cat(lefts, 1)
        right = rights[0] if len(rights) == 1 else torch.cat(rights, 0)
        return Factors(left.to(device), right.to(device))

    def takes_arrays(self) -> bool:
        """Return True if the update can be read without torch: as one product for the whole matrix, by a compiled loop."""
        if len(self.patches) != 1:
            return False
        pair = self.patches[0].pair
        return pair.takes_arrays() and pair.shape == self.spec.shape

    def open(self, device: torch.device) -> ProductSource | PatchSource:
        """Open the update for reading by rows."""
        if len(self.patches) == 1 and (factors := self.factors(device)):
            return ProductSource(LowRankSource(factors, device))
        parts = []
        for patch in self.patches:
            f = patch.pair.factors()
            parts.append((patch.row, patch.col, Factors(f.left.to(device), f.right.to(device))))
        return PatchSource(parts)


def _embed(small: Tensor, shape: tuple[int, int], row: int, col: int) -> Tensor:
    """Return a matrix of zeros with a smaller matrix at a position."""
    large = torch.zeros(shape)
    large[row : row + small.shape[0], col : col + small.shape[1]] = small
    return large


@dataclass(frozen=True)
class ProductSource:
    """Reader of the rows of one product. Implements `adapters.dense.DeltaRows`."""

    product: LowRankSource

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta; `base` is not used."""
        self.product.read(start, stop, out)


@dataclass(frozen=True)
class PatchSource:
    """Reader of the rows of several patches. Implements `adapters.dense.DeltaRows`."""

    parts: list[tuple[int, int, Factors]]

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta; `base` is not used."""
        out.zero_()
        for row, col, factors in self.parts:
            low, high = max(start, row), min(stop, row + factors.left.shape[0])
            if low < high:
                block = out[low - start : high - start, col : col + factors.right.shape[1]]
                block.add_(product(factors.left[low - row : high - row], factors.right))
