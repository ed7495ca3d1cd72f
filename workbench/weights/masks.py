"""Masks over the rows or columns of tensors, and weights with some rows or columns scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.ground.lazy import torch
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, Weights, load

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMask:
    """Some rows, or some columns, of one tensor.

    Attributes:
        axis: Axis of the row view that the mask runs along.
        chosen: bool [rows] or [columns]: the chosen ones.
    """

    axis: Literal["rows", "columns"]
    chosen: Tensor

    @property
    def empty(self) -> bool:
        """True if no row or column is chosen."""
        return not bool(self.chosen.any())

    def to(self, device: torch.device) -> TensorMask:
        """Return the mask on a device."""
        return TensorMask(self.axis, self.chosen.to(device))

    def skips(self, start: int, stop: int) -> bool:
        """Return True if rows start..stop have no chosen element."""
        return self.axis == "rows" and not bool(self.chosen[start:stop].any())

    def keep(self, start: int, stop: int, block: Tensor) -> Tensor:
        """Set everything that is not chosen to zero, in place."""
        others = ~(self.chosen[start:stop, None] if self.axis == "rows" else self.chosen)
        return block.masked_fill_(others, 0.0)

    def put(self, start: int, stop: int, source: Tensor, block: Tensor) -> Tensor:
        """Copy everything that is not chosen from a source into a block of the same shape."""
        chosen = self.chosen[start:stop, None] if self.axis == "rows" else self.chosen
        return torch.where(chosen, block, source, out=block)

    def scale(self, start: int, stop: int, block: Tensor, factor: float) -> Tensor:
        """Multiply everything that is chosen by a factor, in place."""
        chosen = self.chosen[start:stop, None] if self.axis == "rows" else self.chosen
        return block.mul_(torch.where(chosen, factor, 1.0))

    def factors(self, factors: Factors) -> Factors:
        """Return low-rank factors whose product is zero outside the chosen rows or columns; the rank stays the same."""
        if self.axis == "rows":
            return Factors(factors.left * self.chosen[:, None], factors.right)
        return Factors(factors.left, factors.right * self.chosen)


@dataclass(eq=False)
class ScaledWeights:
    """Weights whose chosen rows or columns are multiplied by a factor. Implements `Weights`."""

    current: Weights
    masks: Mapping[str, TensorMask]
    factor: float

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the current weights."""
        return self.current.specs

    def origin(self, name: str) -> str | None:
        """Delegate to the current weights."""
        return self.current.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open the scaled tensor, or the current one if the mask does not include it."""
        source = self.current.open(name, device)
        return _ScaledSource(source, self.masks[name].to(device), self.factor) if name in self.masks else source

    def update(self, name: str, device: torch.device) -> Factors | None:
        """Return the update (factor − 1)·W·1[chosen] of one tensor as a product, of rank 0 if nothing changes.

        Its rank is the number of chosen rows or columns, or the smaller side of the matrix. A fused tensor of several experts has
        no such product.
        """
        spec = self.specs[name]
        mask = self.masks.get(name)
        if mask is None or mask.empty:
            return Factors.zero(spec, device)
        if len(spec.shape) != 2:
            return None
        mask = mask.to(device)
        delta = load(self.current, name, torch.float32, device).mul_(self.factor - 1.0)
        index = mask.chosen.nonzero().flatten()
        if len(index) >= min(spec.shape):
            return Factors.of_dense(mask.keep(0, spec.rows, delta))
        unit = torch.zeros(len(index), len(mask.chosen), device=device)
        unit[torch.arange(len(index), device=device), index] = 1.0
        return Factors(unit.T.contiguous(), delta[index]) if mask.axis == "rows" else Factors(delta[:, index], unit)


@dataclass(eq=False)
class _ScaledSource:
    source: Source
    mask: TensorMask
    factor: float

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.source.read(start, stop, out)
        self.mask.scale(start, stop, out, self.factor)
