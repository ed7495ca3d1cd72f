"""Updates that are no product of two small factors: dense deltas, computed by rows from the adapter and the base.

Every class describes one tensor's update and has `open(device)`, a `merge.stream.DeltaSource`, and `factors`, None.
Formulas are in the orientation of torch.nn.Linear, W [out, in]; `flip` says that the weight is stored as its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from workbench.adapters.entries import Stored
from workbench.adapters.lora import FactorPair
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix


class DeltaRows(Protocol):
    """As `merge.stream.DeltaSource`."""

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        """Fill `out` with rows start..stop of the delta."""


class Update(Protocol):
    """One tensor's update."""

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""

    def factors(self, device: torch.device) -> Factors | None:
        """The delta as a product, where it is one."""


@dataclass(frozen=True)
class _Rows:
    """A delta from a function (start, stop, base rows) -> rows."""

    compute: Callable[[int, int, Tensor], Tensor]

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        out.copy_(self.compute(start, stop, base))


class _Dense:
    def factors(self, device: torch.device) -> Factors | None:
        """Not a product."""
        return None


@dataclass(frozen=True)
class Replaced(_Dense):
    """θ − θ₀ of a weight that the adapter holds whole (`modules_to_save`, `bias`): rows `row`.. of it, from `into` on.

    Rows of the tensor outside into..into + count keep the base.
    """

    stored: Stored
    row: int = 0
    into: int = 0
    count: int | None = None

    def open(self, device: torch.device) -> DeltaRows:
        """The difference by rows."""

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            last = self.into + (self.stored.entry.spec.rows - self.row if self.count is None else self.count)
            low, high = max(start, self.into), min(stop, last)
            delta = torch.zeros_like(base)
            if low < high:
                shift = self.row - self.into
                saved = self.stored.rows(low + shift, high + shift, device)
                torch.sub(saved, base[low - start : high - start], out=delta[low - start : high - start])
            return delta

        return _Rows(compute)


@dataclass(frozen=True)
class TokenRows(_Dense):
    """Rows of the embeddings replaced by trained ones (`trainable_token_indices`): values [tokens, width]."""

    stored: Stored
    indices: tuple[int, ...]

    def open(self, device: torch.device) -> DeltaRows:
        """The difference by rows: zero but at the trained tokens."""
        values = self.stored.read(device)
        places = torch.tensor(self.indices)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            delta = torch.zeros_like(base)
            for i in ((places >= start) & (places < stop)).nonzero().flatten().tolist():
                row = int(places[i]) - start
                delta[row] = values[i] - base[row]
            return delta

        return _Rows(compute)


@dataclass(frozen=True)
class BiasShift(_Dense):
    """scale · b of `lora_bias`, or (l − 1)·θ₀ of (IA)³, on a layer's bias [out]."""

    stored: Stored
    scale: float | None
    """None: the stored vector multiplies the bias."""

    def open(self, device: torch.device) -> DeltaRows:
        """The shift by rows."""
        vector = self.stored.read(device).reshape(-1, 1)
        scale = self.scale
        if scale is None:
            return _Rows(lambda start, stop, base: (vector[start:stop] - 1) * base)
        return _Rows(lambda start, stop, base: vector[start:stop] * scale)


@dataclass(frozen=True)
class Dora(_Dense):
    """m · (W + sBA) / ‖W + sBA‖ − W, the norm taken over each output's inputs (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    Where the weight is stored [in, out] (Conv1D, embeddings), norms need a first pass over the base.
    """

    pair: FactorPair
    magnitude: Stored
    spec: TensorSpec
    reopen: Callable[[torch.device], Source]
    """Opens the base's tensor for that pass."""

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""
        factors = self.pair.factors()
        left, right = factors.left.to(device), factors.right.to(device)
        magnitude = self.magnitude.read(device).flatten()
        if self.pair.flip:
            norms = self._column_norms(left, right, device)
            return _Rows(lambda start, stop, base: (base + left[start:stop] @ right) * (magnitude / norms) - base)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            changed = base + left[start:stop] @ right
            norms: Tensor = torch.linalg.vector_norm(changed, dim=1)
            return changed * (magnitude[start:stop] / norms).unsqueeze(1) - base

        return _Rows(compute)

    def _column_norms(self, left: Tensor, right: Tensor, device: torch.device) -> Tensor:
        source, scratch = self.reopen(device), buffer(self.spec, device)
        squares = torch.zeros(self.spec.cols, dtype=torch.float64, device=device)
        for start, stop in self.spec.blocks(block_elements(device)):
            block = matrix(scratch, start, stop, self.spec.cols)
            source.read(start, stop, block)
            squares += (block + left[start:stop] @ right).double().square().sum(0)
        return squares.sqrt().float()


@dataclass(frozen=True)
class Ia3(_Dense):
    """(l − 1) ⊙ W, along the outputs or, for feed-forward modules, along the inputs (Liu et al. 2022, arXiv 2205.05638)."""

    stored: Stored
    along_rows: bool
    """Whether l has one number for each row of the stored weight, else for each column."""

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""
        vector = self.stored.read(device).flatten() - 1
        if self.along_rows:
            return _Rows(lambda start, stop, base: base * vector[start:stop].unsqueeze(1))
        return _Rows(lambda start, stop, base: base * vector)


@dataclass(frozen=True)
class LoHa(_Dense):
    """s · (w1a·w1b) ⊙ (w2a·w2b) (FedPara, Nam-Hyeon et al. 2022, arXiv 2108.06098)."""

    fields: dict[str, Stored]
    scale: float

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""
        a1, b1, a2, b2 = (self.fields[f"hada_{name}"].read(device) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        scale = self.scale
        return _Rows(lambda start, stop, base: (a1[start:stop] @ b1) * (a2[start:stop] @ b2) * scale)


@dataclass(frozen=True)
class LoKr(_Dense):
    """s · w1 ⊗ w2, each factor whole or a product (LyCORIS, Yeh et al. 2024, arXiv 2309.14859)."""

    fields: dict[str, Stored]
    scale: float

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""
        first, second = (self._factor(name, device) for name in ("w1", "w2"))
        height = second.shape[0]
        scale = self.scale

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            rows = torch.arange(start, stop, device=device)
            outer = first[rows // height].unsqueeze(2) * second[rows % height].unsqueeze(1)
            product: Tensor = outer.reshape(len(rows), -1) * scale
            return product

        return _Rows(compute)

    def _factor(self, name: str, device: torch.device) -> Tensor:
        if f"lokr_{name}" in self.fields:
            return self.fields[f"lokr_{name}"].read(device)
        return self.fields[f"lokr_{name}_a"].read(device) @ self.fields[f"lokr_{name}_b"].read(device)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the product."""
        heights, widths = [], []
        for name in ("w1", "w2"):
            whole = self.fields.get(f"lokr_{name}")
            heights.append((whole or self.fields[f"lokr_{name}_a"]).shape[0])
            widths.append((whole or self.fields[f"lokr_{name}_b"]).shape[1])
        return heights[0] * heights[1], widths[0] * widths[1]


@dataclass(frozen=True)
class Oft(_Dense):
    """W·Rᵀ − W with a block-diagonal rotation R of the inputs (Qiu et al. 2023, arXiv 2306.07280).

    R is Cayley's transform of skew-symmetric blocks Q: (I − Q)(I + Q)⁻¹, or the first `terms` of the Neumann series that PEFT
    uses in its place, I + 2Q + 2Q² + … + Qⁿ⁻¹.
    """

    stored: Stored
    """[blocks, b(b − 1)/2]: the upper triangles of the blocks."""
    share: bool
    """One block for all."""
    terms: int | None
    """None: the exact transform."""

    @property
    def size(self) -> int:
        """b, from the number of elements of a triangle."""
        return round((1 + math.sqrt(1 + 8 * self.stored.shape[-1])) / 2)

    def fits(self, inputs: int) -> bool:
        """Whether the blocks rotate this many inputs."""
        blocks = inputs // self.size if self.share else self.stored.shape[0]
        triangle = self.size * (self.size - 1) // 2 == self.stored.shape[-1]
        return triangle and blocks * self.size == inputs and (not self.share or self.stored.shape[0] == 1)

    def open(self, device: torch.device) -> DeltaRows:
        """The delta by rows."""
        rotation, size = self._rotation(device), self.size

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            blocks = base.view(len(base), -1, size)
            full = rotation.expand(blocks.shape[1], size, size)
            return torch.einsum("nbc,bkc->nbk", blocks, full).reshape(base.shape) - base

        return _Rows(compute)

    def _rotation(self, device: torch.device) -> Tensor:
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
        last = self.terms - 1 if self.terms < 3 else max(self.terms - 1, 3)  # PEFT takes three terms as four
        for k in range(1, last + 1):
            power = power @ skew
            total += power * (1 if k == last and k > 1 else 2)
        return total


@dataclass(frozen=True)
class Summed:
    """Several updates of one tensor, added."""

    updates: tuple[Update, ...]

    def factors(self, device: torch.device) -> Factors | None:
        """The stacked factors, where every update is a product."""
        found = [update.factors(device) for update in self.updates]
        known = [f for f in found if f is not None]
        if len(known) != len(found):
            return None
        return Factors(torch.cat([f.left for f in known], 1), torch.cat([f.right for f in known], 0))

    def open(self, device: torch.device) -> DeltaRows:
        """The sum by rows."""
        sources = [update.open(device) for update in self.updates]

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            total, part = torch.zeros_like(base), torch.empty_like(base)
            for source in sources:
                source.read_delta(start, stop, base, part)
                total += part
            return total

        return _Rows(compute)


def added(old: Update | None, new: Update) -> Update:
    """Two updates of one tensor as one."""
    if old is None:
        return new
    if isinstance(old, Summed):
        return replace(old, updates=(*old.updates, new))
    return Summed((old, new))
