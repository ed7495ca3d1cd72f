"""An adapter on a base: the updates of the base's tensors, readable in row blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from workbench.adapters.binder import Binder
from workbench.adapters.dense import DeltaRows, Update
from workbench.adapters.flavours import unknown_fields
from workbench.adapters.lora import LowRank
from workbench.adapters.read import CONFIG, Adapter
from workbench.models.layout import Model
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix


def bind(adapter: Adapter, specs: Mapping[str, TensorSpec], base: Model | None = None) -> BoundAdapter:
    """Return the adapter's updates under the names of the base's tensors.

    Args:
        adapter: The adapter.
        specs: The base's tensors.
        base: The base itself: needed for DoRA, for modules that transformers renames or fuses, and to tell copies of
            the base's weights from changed ones.

    Raises:
        WorkbenchError: A module that the base lacks, shapes that do not fit, a part that has no exact place.
    """
    if base is not None and adapter.bound is not None and adapter.bound[0] is base:
        kept: BoundAdapter = adapter.bound[1]  # `resolve`, `plan` and `compose` each ask for it
        return kept
    binder = Binder(adapter, specs, base)
    binder.bind()
    notes = list(binder.notes)
    if unknown := unknown_fields(adapter.config):
        notes.append(f"{adapter.label}: {CONFIG} sets {', '.join(unknown)}, which is not known here and not used")
    found = BoundAdapter(adapter, binder.updates, notes)
    if base is not None:
        adapter.bound = (base, found)
    return found


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter's deltas under the base's names; implements `merge.stream.Deltas`.

    Attributes:
        adapter: The adapter.
        places: Tensor of the base -> its update; nothing is read before an update is opened.
        notes: What the user should know of it.
    """

    adapter: Adapter
    places: dict[str, Update]
    notes: list[str] = field(default_factory=list)

    def touches(self, name: str) -> bool:
        """Whether the adapter updates a tensor."""
        return name in self.places

    def factors(self, name: str, device: torch.device) -> Factors | None:
        """One tensor's update as a product, float32; None where it is dense. Errors: NaN and infinities."""
        return self.places[name].factors(device)

    def is_zero(self, base: Model) -> bool:
        """Return whether every update is zero on the base, up to rounding; stop at the first update that changes something."""
        return all(
            _is_zero(update, partial(base.weights.open, name), base.weights.specs[name]) for name, update in self.places.items()
        )

    def open_model(self, name: str, device: torch.device) -> None:
        """None: an adapter holds updates."""

    def open_delta(self, name: str, device: torch.device) -> DeltaRows:
        """One tensor's update by rows."""
        return self.places[name].open(device)


def _is_zero(update: Update, open_base: Callable[[torch.device], Source], spec: TensorSpec) -> bool:
    """Return whether an update is zero relative to the base's largest number: a low-rank one by its factors, others by their rows."""
    if isinstance(update, LowRank):
        return not any(patch.pair.a.read().any() and patch.pair.b.read().any() for patch in update.patches)
    cpu = torch.device("cpu")
    source, rows = open_base(cpu), update.open(cpu)
    rooms = buffer(spec, cpu), buffer(spec, cpu)
    for start, stop in spec.blocks(block_elements(cpu)):
        base, delta = (matrix(room, start, stop, spec.cols) for room in rooms)
        source.read(start, stop, base)
        rows.read_delta(start, stop, base, delta)
        if delta.abs().max() > 1e-6 * base.abs().max():
            return False
    return True
