"""The bricks of a merge step, and the forms of a brick's deltas: differences of checkpoints, masked ones, and ones on another vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from workbench.ground.lazy import np, torch
from workbench.weights import kernels
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, StoredSource, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.adapters.dense import DeltaRows
    from workbench.weights.masks import TensorMask
    from workbench.weights.row_alignment import Index


class Deltas(Protocol):
    """A brick's deltas: fine-tuned weights minus base."""

    def touches(self, name: str) -> bool:
        """Return whether the brick may differ from the base at this tensor."""

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """Open the delta of one tensor that the brick touches."""

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the delta of one tensor as an exact low-rank product, or None if it is not one."""

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor itself, or return None if the brick stores an update instead."""


@dataclass(eq=False)
class WeightsDelta:
    """Deltas of a full set of weights (a checkpoint, or another recipe's result): its difference from the base.

    Attributes:
        weights: The weights.
        lacking: Tensors of the base that the checkpoint does not have.
    """

    weights: Weights
    lacking: Collection[str] = ()

    def touches(self, name: str) -> bool:
        """Return True, except for a tensor that the brick lacks: every other one may differ."""
        return name not in self.lacking

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """Open θ − θ₀ of one tensor."""
        return _Difference(self.weights.open(name, device))

    def open_model(self, name: str, device: torch.device) -> Source:
        """Open θ of one tensor."""
        return self.weights.open(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return None: a difference of checkpoints has full rank."""
        return None


class _Difference:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._stored = source if isinstance(source, StoredSource) else None

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        if self._stored is None:
            self._source.read(start, stop, out)
            out.sub_(base)
        elif not kernels.difference(self._stored.raw(start, stop), base, out):
            self._stored.refuse_non_finite(start, stop)


@dataclass(eq=False)
class MaskedDeltas:
    """Deltas that are zero outside the chosen rows or columns. Low-rank deltas stay low-rank. Implements `Deltas`.

    Attributes:
        inner: The brick's deltas.
        masks: Tensor of the base -> rows or columns to keep. Other tensors keep their whole delta.
    """

    inner: Deltas
    masks: Mapping[str, TensorMask]

    def touches(self, name: str) -> bool:
        """Return whether the brick may differ from the base at a chosen row or column of this tensor."""
        return self.inner.touches(name) and not (name in self.masks and self.masks[name].empty)

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """Open the delta of one tensor."""
        source = self.inner.open_delta(name, device)
        return _MaskedDelta(source, self.masks[name].to(device)) if name in self.masks else source

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor; None for a masked tensor, which no file holds."""
        return None if name in self.masks else self.inner.open_model(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the factors with zeros in the rows of the left one, or in the columns of the right one."""
        factors = self.inner.factors(name, device)
        return self.masks[name].to(device).factors(factors) if factors is not None and name in self.masks else factors


@dataclass(eq=False)
class _MaskedDelta:
    source: DeltaRows
    mask: TensorMask

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        if self.mask.skips(start, stop):
            out.zero_()
            return
        self.source.read_delta(start, stop, base, out)
        self.mask.keep(start, stop, out)


@dataclass(eq=False)
class AlignedDeltas:
    """Deltas with rows moved from the base's vocabulary to the output's; zero in rows that the base does not have.

    Attributes:
        inner: Deltas on the base as stored on disk.
        index: [rows of the output], the base's row or -1.
        tensors: Names of the tensors that have one row per token.
    """

    inner: Deltas
    index: Index
    tensors: Collection[str]

    def touches(self, name: str) -> bool:
        """Return whether the adapter may differ from the base at this tensor."""
        return self.inner.touches(name)

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """Open the delta of one tensor."""
        source = self.inner.open_delta(name, device)
        return _AlignedDelta(source, self.index) if name in self.tensors else source

    def open_model(self, name: str, device: torch.device) -> Source | None:
        """Open the fine-tuned tensor if its rows do not move; otherwise return None."""
        return None if name in self.tensors else self.inner.open_model(name, device)

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return the factors, with the rows of the left factor moved."""
        factors = self.inner.factors(name, device)
        if factors is None or name not in self.tensors:
            return factors
        left = torch.cat([factors.left, factors.left.new_zeros(1, factors.rank)])
        return Factors(left[torch.from_numpy(self.index).to(device)], factors.right)


@dataclass(eq=False)
class _AlignedDelta:
    source: DeltaRows
    index: Index

    def read_delta(self, start: int, stop: int, base: Tensor, out: Tensor) -> None:
        from workbench.weights.row_alignment import runs

        index = self.index[start:stop]
        places = np.flatnonzero(index >= 0)
        if len(places) < len(index):
            out.zero_()
        if len(places):
            for offset, row, length in runs(places, index[places]):
                self.source.read_delta(row, row + length, base[offset : offset + length], out[offset : offset + length])


@dataclass(frozen=True)
class StepBricks:
    """The bricks of a merge step.

    Attributes:
        deltas: Their deltas by name.
        keys: Sort keys by name; the name itself for a brick without one. If the method is permutation invariant, bricks are processed
            in the order of these keys, so that the last bits of sums depend neither on the bricks' names nor on their order in the
            recipe.
        digests: Function that returns the digest of each brick's content, for random masks and the memo. It may read whole bricks,
            so it is called only when a method needs it. None: the sort keys.
        masks: Base's tensor -> the rows or columns that the step may change; other tensors may change everywhere. The bricks' deltas
            are zero elsewhere (`MaskedDeltas`), and current values stay there, although some methods spread a delta over its tensor.
    """

    deltas: Mapping[str, Deltas]
    keys: Mapping[str, str] = field(default_factory=dict)
    digests: Callable[[], Mapping[str, str]] | None = None
    masks: Mapping[str, TensorMask] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """Return the sort key of a brick."""
        return self.keys.get(name, name)

    def in_order(self, *, by_key: bool) -> dict[str, Deltas]:
        """Return the deltas in the order of their keys, or in that of the recipe."""
        order = sorted(self.deltas, key=lambda name: (self.key(name), name)) if by_key else self.deltas
        return {name: self.deltas[name] for name in order}

    def contents(self) -> Mapping[str, str]:
        """Return the digest of each brick's content."""
        return self.digests() if self.digests else {name: self.key(name) for name in self.deltas}
