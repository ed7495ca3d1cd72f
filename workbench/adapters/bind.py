"""Binding of an adapter to a base: an update per tensor of the base, readable in row blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from workbench.adapters.dense import DeltaRows, Summed, Update, UpdatedSource
from workbench.adapters.flavours import unknown_fields
from workbench.adapters.keys import Stored
from workbench.adapters.lora import LowRank, Places
from workbench.adapters.read import CONFIG, Adapter
from workbench.ground.lazy import torch
from workbench.models.architecture import UntiedWeights
from workbench.models.layout import Model
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

# Adapter -> the base that it was bound to last, and the result: `resolve`, `plan` and `compose` bind the same adapters again.
# An entry lives as long as its adapter, because no update refers to the adapter itself.
_last: WeakKeyDictionary[Adapter, tuple[Model, BoundAdapter]] = WeakKeyDictionary()


def bind(adapter: Adapter, specs: Mapping[str, TensorSpec], base: Model | None = None) -> BoundAdapter:
    """Return the adapter's updates under the names of the base's tensors.

    Args:
        adapter: The adapter.
        specs: The base's tensors.
        base: The base itself. DoRA and modules that transformers renames or fuses require it. It also serves to
            distinguish unchanged copies of the base's weights from changed ones.

    Raises:
        WorkbenchError: If the base lacks a module of the adapter, if shapes differ, or if part of the adapter cannot be
            expressed exactly as a change of the base's tensors.
    """
    from workbench.adapters.binder import Binder

    last = _last.get(adapter)
    if base is not None and last is not None and last[0] is base:
        return last[1]
    binder = Binder(adapter, specs, base)
    binder.bind()
    notes = list(binder.notes)
    if unknown := unknown_fields(adapter.config):
        notes.append(f"{adapter.label}: {CONFIG} sets {', '.join(unknown)}, which is not supported and is ignored")
    bound = BoundAdapter(binder.updates, notes)
    if base is not None:
        _last[adapter] = (base, bound)
    return bound


@dataclass(frozen=True)
class BoundAdapter:
    """The deltas of an adapter under the base's tensor names. Implements `merge.streaming.deltas.Deltas`."""

    places: dict[str, Update]
    notes: list[str] = field(default_factory=list)

    def touches(self, name: str) -> bool:
        """Return whether the adapter updates a tensor."""
        return name in self.places

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """Return a tensor's update as a low-rank product in float32, or None if it is dense."""
        return self.places[name].factors(device)

    def rank(self, name: str) -> int | None:
        """Return the number of rank-one terms of a tensor's update, or None if it is dense."""
        return _rank(self.places[name])

    def is_zero(self, base: Model) -> bool:
        """Return whether every update is zero on the base, up to rounding, stopping at the first one that is not."""
        return all(
            _is_zero(update, partial(base.weights.open, name), base.weights.specs[name]) for name, update in self.places.items()
        )

    def open_model(self, name: str, device: torch.device) -> None:
        """Return None, because an adapter holds updates and not a whole model."""

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """Open a tensor's update for reading by rows."""
        return self.places[name].open(device)

    def updated(self, weights: Weights, name: str, source: Source, device: torch.device) -> Source:
        """Return the reader of a tensor of the base plus its update."""
        return UpdatedSource(source, self.open_delta(name, device), weights.specs[name], device) if self.touches(name) else source


class AdaptedWeights:
    """A base with an adapter on it, in the adapter's vocabulary: rows that it adds to the base's follow those; implements `Weights`.

    Args:
        adapter: The adapter.
        base: The base that it is used on.
    """

    def __init__(self, adapter: Adapter, base: Model) -> None:
        self._adapter = adapter
        weights = base.weights.tied if isinstance(base.weights, UntiedWeights) else base.weights
        places, added = Places(base.weights.specs, base.config), dict[str, Stored]()
        for name, stored in adapter.keys.saved.items():
            disk = places.whole(name) if name.rpartition(".")[0] in adapter.keys.vocabulary else None
            if disk is not None and disk in weights.specs:
                shape = weights.specs[disk].shape
                added |= {disk: stored} if stored.shape[1:] == shape[1:] and stored.shape[0] > shape[0] else {}
        if added:
            weights = _Longer(weights, added)
            if isinstance(base.weights, UntiedWeights):
                weights = UntiedWeights(weights, base.weights.embeddings, base.weights.head)
            base = Model(weights, {**base.config, "vocab_size": max(stored.shape[0] for stored in added.values())})
        self.base, self.specs = base, base.weights.specs

    @cached_property
    def bound(self) -> BoundAdapter:
        """The updates, zero in rows that are stored as they are."""
        return bind(self._adapter, self.specs, self.base)

    def origin(self, name: str) -> str | None:
        """Delegate to the base."""
        return self.base.weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor with the adapter's update."""
        return self.bound.updated(self, name, self.base.weights.open(name, device), device)


class _Longer:
    """Weights with rows of an adapter after the last row of some tensors."""

    def __init__(self, weights: Weights, added: Mapping[str, Stored]) -> None:
        self._weights, self._added = weights, added
        self.specs = {n: TensorSpec(added[n].shape, s.stored) if n in added else s for n, s in weights.specs.items()}

    def origin(self, name: str) -> str | None:
        return self._weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        source = self._weights.open(name, device)
        return _LongerSource(source, self._weights.specs[name].rows, self._added[name]) if name in self._added else source


@dataclass(frozen=True)
class _LongerSource:
    source: Source
    rows: int
    added: Stored

    def read(self, start: int, stop: int, out: Tensor) -> None:
        own = min(max(self.rows - start, 0), stop - start)
        if own:
            self.source.read(start, start + own, out[:own])
        if own < stop - start:
            out[own:] = self.added.rows(start + own, stop, out.device)


def _rank(update: Update) -> int | None:
    if isinstance(update, LowRank):
        return sum(patch.pair.rank for patch in update.patches)
    ranks = [_rank(part) for part in update.updates] if isinstance(update, Summed) else [None]
    return None if None in ranks else sum(rank for rank in ranks if rank is not None)


def _is_zero(update: Update, open_base: Callable[[torch.device], Source], spec: TensorSpec) -> bool:
    """Return whether an update is zero: low-rank factors exactly, other updates relative to the base's largest number."""
    if isinstance(update, LowRank):
        return all(patch.pair.a.is_zero() or patch.pair.b.is_zero() for patch in update.patches)
    cpu = torch.device("cpu")
    source, rows = open_base(cpu), update.open(cpu)
    buffers = buffer(spec, cpu), buffer(spec, cpu)
    for start, stop in spec.blocks(block_elements(cpu)):
        base, delta = (matrix(b, start, stop, spec.cols) for b in buffers)
        source.read(start, stop, base)
        rows.read_delta(start, stop, base, delta)
        if delta.abs().max() > 1e-6 * base.abs().max():
            return False
    return True
