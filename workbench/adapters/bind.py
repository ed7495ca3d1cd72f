"""Binding of an adapter to a base: an update per tensor of the base, readable in row blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

from workbench.adapters.binder import Binder
from workbench.adapters.dense import DeltaRows, Summed, Update
from workbench.adapters.flavours import unknown_fields
from workbench.adapters.lora import LowRank
from workbench.adapters.read import CONFIG, Adapter
from workbench.lazy import torch
from workbench.models.layout import Model
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix

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
