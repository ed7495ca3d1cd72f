"""LoRA updates as exact low-rank products on whole weights, slices of fused weights, and experts of stacked weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.adapters.entries import Stored
from workbench.lazy import torch
from workbench.weights.arrays import HOST
from workbench.weights.kernels import KINDS, product
from workbench.weights.lowrank import Factors, LowRankSource
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

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
            device: `HOST` for arrays, which takes factors of whole weights without singular values; otherwise tensors on the CPU.

        Raises:
            WorkbenchError: If a factor holds NaN or infinity.
        """
        if self.expert:
            index, count = self.expert
            right = self.a.rows(index * self.rank, (index + 1) * self.rank)
            left = self.b.columns(index, count)
        else:
            memory = HOST if device is HOST else None
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
    """Reader of the rows of one product. Implements `merge.streaming.deltas.DeltaSource`."""

    product: LowRankSource

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta; `base` is not used."""
        self.product.read(start, stop, out)


@dataclass(frozen=True)
class PatchSource:
    """Reader of the rows of several patches. Implements `merge.streaming.deltas.DeltaSource`."""

    parts: list[tuple[int, int, Factors]]

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta; `base` is not used."""
        out.zero_()
        for row, col, factors in self.parts:
            low, high = max(start, row), min(stop, row + factors.left.shape[0])
            if low < high:
                block = out[low - start : high - start, col : col + factors.right.shape[1]]
                block.add_(product(factors.left[low - row : high - row], factors.right))
