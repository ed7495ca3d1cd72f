"""Updates that are not a product of two small factors: dense deltas, computed by rows from the adapter and the base.

Every class describes one tensor's update. Its `open(device)` returns `DeltaRows`, and `factors` returns None.
Formulas use the orientation of torch.nn.Linear, W [out, in]; `flip` means that the weight is stored transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from workbench.adapters.keys import Stored
from workbench.adapters.lora import FactorPair
from workbench.ground.lazy import torch
from workbench.weights.kernels import product
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor


class DeltaRows(Protocol):
    """Interface of the delta of one tensor, readable in blocks of rows."""

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with the delta of rows start..stop; `base` holds the same rows of the base."""


class Update(Protocol):
    """Interface of the update of one tensor."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""

    def factors(self, device: torch.device) -> Factors | None:
        """Return the delta as a low-rank product, or None if it is dense."""


@dataclass(frozen=True)
class Rows:
    """A delta computed by a function (start, stop, base rows) -> rows."""

    compute: Callable[[int, int, Tensor], Tensor]

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta."""
        out.copy_(self.compute(start, stop, base))


class Dense:
    """Base of the updates that are no product of factors."""

    def factors(self, device: torch.device) -> Factors | None:
        """Return None, because the delta is dense."""
        return None


@dataclass(frozen=True)
class Replaced(Dense):
    """θ − θ₀ of a weight that the adapter holds whole (`modules_to_save`, `bias`).

    Rows row..row + count of the stored weight replace rows into..into + count of the base's tensor; other rows do not change.
    """

    stored: Stored
    row: int = 0
    into: int = 0
    count: int | None = None
    """Number of rows; None means all from `row` on."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the difference for reading by rows."""

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            last = self.into + (self.stored.entry.spec.rows - self.row if self.count is None else self.count)
            low, high = max(start, self.into), min(stop, last)
            delta = torch.zeros_like(base)
            if low < high:
                shift = self.row - self.into
                saved = self.stored.rows(low + shift, high + shift, device)
                torch.sub(saved, base[low - start : high - start], out=delta[low - start : high - start])
            return delta

        return Rows(compute)


@dataclass(frozen=True)
class TokenRows(Dense):
    """Trained rows that replace rows of the embeddings (`trainable_token_indices`); values are [tokens, width]."""

    stored: Stored
    indices: tuple[int, ...]

    def open(self, device: torch.device) -> DeltaRows:
        """Open the difference for reading by rows; it is zero except at the trained tokens."""
        values = self.stored.read(device)
        places = torch.tensor(self.indices)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            delta = torch.zeros_like(base)
            for i in ((places >= start) & (places < stop)).nonzero().flatten().tolist():
                row = int(places[i]) - start
                delta[row] = values[i] - base[row]
            return delta

        return Rows(compute)


@dataclass(frozen=True)
class BiasShift(Dense):
    """scale · b of `lora_bias`, or (l − 1)·θ₀ of (IA)³, on a layer's bias [out]."""

    stored: Stored
    scale: float | None
    """Factor of the stored vector; None means that the vector multiplies the bias, as in (IA)³."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the shift for reading by rows."""
        vector = self.stored.read(device).reshape(-1, 1)
        scale = self.scale
        if scale is None:
            return Rows(lambda start, stop, base: (vector[start:stop] - 1) * base)
        return Rows(lambda start, stop, base: vector[start:stop] * scale)


@dataclass(frozen=True)
class Dora(Dense):
    """m · (W + sBA) / ‖W + sBA‖ − W, with one norm per output (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    If the weight is stored as [in, out] (Conv1D, embeddings), a first pass over the base computes the norms.
    """

    pair: FactorPair
    magnitude: Stored
    spec: TensorSpec
    reopen: Callable[[torch.device], Source]
    """Function that opens the base's tensor for that pass."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        factors = self.pair.factors()
        left, right = factors.left.to(device), factors.right.to(device)
        magnitude = self.magnitude.read(device).flatten()
        if self.pair.flip:
            norms = self._column_norms(left, right, device)
            return Rows(lambda start, stop, base: (base + product(left[start:stop], right)) * (magnitude / norms) - base)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            changed = base + product(left[start:stop], right)
            norms = _summed(changed.double().square(), 1).sqrt().float()
            return changed * (magnitude[start:stop] / norms).unsqueeze(1) - base

        return Rows(compute)

    def _column_norms(self, left: Tensor, right: Tensor, device: torch.device) -> Tensor:
        """Return the norms of the columns of the base plus the update; the order of the sums does not depend on the blocks."""
        source, scratch = self.reopen(device), buffer(self.spec, device)
        squares = torch.zeros(self.spec.cols, dtype=torch.float64, device=device)
        for start, stop in self.spec.blocks(block_elements(device)):
            block = matrix(scratch, start, stop, self.spec.cols)
            source.read(start, stop, block)
            changed = block + product(left[start:stop], right)
            squares = _summed(torch.cat([squares.unsqueeze(0), changed.double().square()]), 0)
        return squares.sqrt().float()


def _summed(terms: Tensor, dim: int) -> Tensor:
    """Return the sum over a dimension in a fixed order: on CUDA, which has none for `cumsum`, that of `sum`."""
    return terms.sum(dim) if terms.device.type == "cuda" else terms.cumsum(dim).select(dim, -1)


@dataclass(frozen=True)
class Ia3(Dense):
    """(l − 1) ⊙ W, along the outputs, or along the inputs of feed-forward modules (Liu et al. 2022, arXiv 2205.05638)."""

    stored: Stored
    along_rows: bool
    """True if l has one number per row of the stored weight, False if it has one per column."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        vector = self.stored.read(device).flatten() - 1
        if self.along_rows:
            return Rows(lambda start, stop, base: base * vector[start:stop].unsqueeze(1))
        return Rows(lambda start, stop, base: base * vector)


@dataclass(frozen=True)
class LoHa(Dense):
    """s · (w1a·w1b) ⊙ (w2a·w2b) (FedPara, Nam-Hyeon et al. 2022, arXiv 2108.06098)."""

    fields: dict[str, Stored]
    scale: float

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        a1, b1, a2, b2 = (self.fields[f"hada_{name}"].read(device) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        scale = self.scale
        return Rows(lambda start, stop, base: product(a1[start:stop], b1) * product(a2[start:stop], b2) * scale)


@dataclass(frozen=True)
class LoKr(Dense):
    """s · w1 ⊗ w2, where each factor is stored whole or as a product (LyCORIS, Yeh et al. 2024, arXiv 2309.14859)."""

    fields: dict[str, Stored]
    scale: float

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        first, second = (self._factor(name, device) for name in ("w1", "w2"))
        height = second.shape[0]
        scale = self.scale

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            rows = torch.arange(start, stop, device=device)
            outer = first[rows // height].unsqueeze(2) * second[rows % height].unsqueeze(1)
            delta: Tensor = outer.reshape(len(rows), -1) * scale
            return delta

        return Rows(compute)

    def _factor(self, name: str, device: torch.device) -> Tensor:
        """Return a Kronecker factor, computed from its low-rank parts if it is stored that way."""
        if f"lokr_{name}" in self.fields:
            return self.fields[f"lokr_{name}"].read(device)
        return product(self.fields[f"lokr_{name}_a"].read(device), self.fields[f"lokr_{name}_b"].read(device))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product, [out, in]."""
        heights, widths = [], []
        for name in ("w1", "w2"):
            full = self.fields.get(f"lokr_{name}")
            heights.append((full or self.fields[f"lokr_{name}_a"]).shape[0])
            widths.append((full or self.fields[f"lokr_{name}_b"]).shape[1])
        return heights[0] * heights[1], widths[0] * widths[1]


@dataclass(frozen=True)
class Oft(Dense):
    """W·Rᵀ − W with a block-diagonal rotation R of the inputs (Qiu et al. 2023, arXiv 2306.07280).

    R is the Cayley transform (I − Q)(I + Q)⁻¹ of skew-symmetric blocks Q, or PEFT's approximation by the first `terms` terms
    of a Neumann series, I + 2Q + 2Q² + … + Qⁿ⁻¹.
    """

    stored: Stored
    """Upper triangles of the blocks, [blocks, b(b − 1)/2]."""
    share: bool
    """True if all blocks are the same block."""
    terms: int | None
    """Number of terms of the Neumann series; None computes the exact transform."""

    @property
    def size(self) -> int:
        """The block size b, computed from the number of elements of a triangle."""
        return round((1 + math.sqrt(1 + 8 * self.stored.shape[-1])) / 2)

    def takes(self, inputs: int) -> bool:
        """Return whether the blocks add up to this many inputs."""
        blocks = inputs // self.size if self.share else self.stored.shape[0]
        triangle = self.size * (self.size - 1) // 2 == self.stored.shape[-1]
        return triangle and blocks * self.size == inputs and (not self.share or self.stored.shape[0] == 1)

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        rotation, size = self._rotation(device), self.size

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            blocks = base.view(len(base), -1, size)
            full = rotation.expand(blocks.shape[1], size, size)
            return torch.einsum("nbc,bkc->nbk", blocks, full).reshape(base.shape) - base

        return Rows(compute)

    def _rotation(self, device: torch.device) -> Tensor:
        """Return the blocks' rotations by the Cayley transform, or its Neumann series of `terms` terms as in PEFT."""
        upper = self.stored.read(device)
        rows, cols = torch.triu_indices(self.size, self.size, 1)
        skew = torch.zeros(len(upper), self.size, self.size, device=device)
        skew[:, rows, cols] = upper
        skew = skew - skew.transpose(1, 2)
        eye = torch.eye(self.size, device=device).expand_as(skew)
        if self.terms is None:
            solved: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
            return solved
        total, power = eye.clone(), eye
        last = self.terms - 1 if self.terms < 3 else max(self.terms - 1, 3)  # PEFT treats three terms as four
        for k in range(1, last + 1):
            power = power @ skew
            total += power * (1 if k == last and k > 1 else 2)
        return total


@dataclass(frozen=True)
class Summed:
    """Sum of several updates of one tensor."""

    updates: tuple[Update, ...]

    def factors(self, device: torch.device) -> Factors | None:
        """Return the stacked factors, or None if one of the updates is dense."""
        factors = [f for f in (update.factors(device) for update in self.updates) if f is not None]
        if len(factors) != len(self.updates):
            return None
        return Factors(torch.cat([f.left for f in factors], 1), torch.cat([f.right for f in factors], 0))

    def open(self, device: torch.device) -> DeltaRows:
        """Open the sum for reading by rows."""
        sources = [update.open(device) for update in self.updates]

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            total, part = torch.zeros_like(base), torch.empty_like(base)
            for source in sources:
                source.read_delta(start, stop, base, part)
                total += part
            return total

        return Rows(compute)


def added(old: Update | None, new: Update) -> Update:
    """Return the sum of two updates of one tensor."""
    if old is None:
        return new
    if isinstance(old, Summed):
        return replace(old, updates=(*old.updates, new))
    return Summed((old, new))


class UpdatedSource:
    """A tensor plus its delta, in float32."""

    def __init__(self, base: Source, delta: DeltaRows, spec: TensorSpec, device: torch.device) -> None:
        self._base, self._delta, self._cols = base, delta, spec.cols
        self._scratch = buffer(spec, device)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop."""
        update = matrix(self._scratch, start, stop, self._cols)
        self._base.read(start, stop, out)
        self._delta.read_delta(start, stop, out, update)
        out.add_(update)
