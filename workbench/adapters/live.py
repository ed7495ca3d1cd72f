"""Places of a base's tensors in the live model of transformers, and weights under the live model's division into tensors.

The live model can hold several tensors on disk as one, such as the experts of a layer, or one tensor as several. An adapter updates what the
live model holds, so such tensors are joined first. Everything else keeps its name on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from workbench.adapters.lora import Places, Spot
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d, is_head_module
from workbench.models.layout import Model
from workbench.models.skeleton import skeleton
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding", "parameter", "other"]


@dataclass(frozen=True)
class Place:
    """A tensor of the live model that the base stores.

    Attributes:
        module: Its module.
        kind: Kind of the module's weight; "parameter" for parameters of experts, which PEFT updates by their own names.
        parameter: Its name in the module.
        shape: Its shape; [experts, rows, cols] for a stack.
        disk: The one tensor on disk that is the same; None if it is joined from parts.
        spots: The parts, one per expert of a stack; none for another tensor that is the same on disk.
    """

    module: str
    kind: Kind
    parameter: str
    shape: tuple[int, ...]
    disk: str | None
    spots: tuple[Spot, ...]

    @property
    def name(self) -> str:
        """Its name in the live model."""
        return f"{self.module}.{self.parameter}"

    @property
    def all_spots(self) -> tuple[Spot, ...]:
        """The parts, of which a tensor that is the same on disk is the only one."""
        if self.spots or self.disk is None:
            return self.spots
        cols = self.shape[-1] if len(self.shape) > 1 else 1
        return (Spot(self.disk, 0, 0, None, (0, math.prod(self.shape) // cols), (0, cols), swap=False),)

    @property
    def matrices(self) -> int:
        """Number of matrices that an update has factors for: the experts of a stack, else 1."""
        return self.shape[0] if self.kind == "parameter" and len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Live:
    """The live model's tensors, as adapters see them.

    Attributes:
        places: Tensor -> its place, in the model's order. The name is that on disk where one tensor there is the same, else the live one.
        units: Tensor on disk -> the tensors of `places` that it is part of; itself if the live model has none.
        modules: All module names.
        ends: Modules of the input embeddings and the head.
        head: The head's module if it shares the weight of the input embeddings, else None.
        transposed: Modules that hold stacks of experts as [in, out].
        generates: Whether PEFT can wrap the class as a causal language model.
    """

    places: Mapping[str, Place]
    units: Mapping[str, tuple[str, ...]]
    modules: frozenset[str]
    ends: frozenset[str]
    head: str | None
    transposed: frozenset[str]
    generates: bool

    @property
    def conv1d(self) -> bool:
        """True if the base stores its linear weights as [in, out]."""
        return any(place.kind == "conv1d" for place in self.places.values())

    @property
    def mixture(self) -> bool:
        """True if the model has stacks of experts."""
        return any(place.matrices > 1 for place in self.places.values())

    @cached_property
    def loose(self) -> Mapping[str, str]:
        """Tensor -> its module, for tensors that PEFT can only save together with other modules or with parameters of experts."""
        factored = {place.module for place in self.places.values() if place.kind != "other"}
        own = {name: place.module for name, place in self.places.items() if place.kind == "other"}
        linear = {place.module for place in self.places.values() if place.kind not in ("other", "parameter")}
        return {
            name: module
            for name, module in own.items()
            if module not in linear and (module in factored or any(m.startswith(f"{module}.") for m in factored))
        }


def live_places(model: Model) -> Live:
    """Build the model of the class that config.json names on the meta device, and find the place of every tensor.

    Raises:
        WorkbenchError: If transformers has no such class.
    """
    places = Places(model.weights.specs, model.config)
    layout = places.layout
    if layout is None:
        raise WorkbenchError(
            f"config.json: model_type {model.config.get('model_type')} is not a model of transformers",
            "Adapters can only be written for such models: use `output: {form: checkpoint}`.",
        )
    live = skeleton(json.dumps(model.config, sort_keys=True))
    modules = dict(live.named_modules())
    found: dict[str, Place] = {}
    for name, shape in layout.shapes.items():
        owner, _, parameter = name.rpartition(".")
        if name not in layout.pieces or not owner:
            continue
        disk = places.whole(name)
        disk = disk if disk and model.weights.specs[disk].shape == shape else None
        kind = _kind(modules[owner], parameter, shape)
        spots = () if disk and kind != "parameter" else tuple(places.spots(name))
        if disk or spots:
            found[disk or name] = Place(owner, kind, parameter, shape, disk, spots)
    _drop_incomplete(found, model.weights.specs)
    units: dict[str, tuple[str, ...]] = {}
    for unit, place in found.items():
        for disk in (place.disk,) if place.disk else dict.fromkeys(spot.disk for spot in place.spots):
            units[disk] = (*units.get(disk, ()), unit)
    names = {id(module): name for name, module in modules.items()}
    first, last = (_end(live, kind) for kind in ("input", "output"))
    ends = {names[id(module)] for module in (first, last) if id(module) in names}
    heads = {place.module for place in found.values() if place.kind == "linear" and is_head_module(place.module)}
    head = names.get(id(last))
    tied = head is not None and f"{head}.weight" in live.all_tied_weights_keys and head not in {p.module for p in found.values()}
    return Live(
        found,
        {name: units.get(name, (name,)) for name in model.weights.specs},
        frozenset(modules),
        frozenset(ends | heads),
        head if tied else None,
        layout.transposed,
        hasattr(live, "prepare_inputs_for_generation"),
    )


def _drop_incomplete(places: dict[str, Place], specs: Mapping[str, TensorSpec]) -> None:
    """Remove tensors that are made from a part of a tensor on disk whose rest has no place: no adapter could hold the rest."""
    while True:
        covered = dict.fromkeys(specs, 0)
        for place in places.values():
            if place.disk:
                covered[place.disk] = specs[place.disk].numel
            else:
                for spot in place.spots:
                    covered[spot.disk] += (spot.rows[1] - spot.rows[0]) * (spot.cols[1] - spot.cols[0])
        partly = {name for name, count in covered.items() if 0 < count < specs[name].numel}
        dropped = [unit for unit, place in places.items() if not place.disk and partly & {spot.disk for spot in place.spots}]
        if not dropped:
            return
        for unit in dropped:
            del places[unit]


def _end(live: Any, kind: str) -> Any:
    """Return the module of the input or output embeddings; None for a class that has none or several."""
    try:
        return getattr(live, f"get_{kind}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def _kind(module: nn.Module, parameter: str, shape: tuple[int, ...]) -> Kind:
    stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] == getattr(module, "num_experts", None)]
    if stacks and len(shape) in (2, 3) and shape[0] == len(stacks[0]):
        return "parameter"
    if parameter != "weight":
        return "other"
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


class Joined:
    """A checkpoint's weights under the names of `Live.places`, and tensors without a place under their own; implements `Weights`."""

    def __init__(self, weights: Weights, live: Live) -> None:
        self._weights, self._places = weights, live.places
        self.specs: dict[str, TensorSpec] = {}
        for disk, units in live.units.items():
            for unit in units:
                shape = live.places[unit].shape if unit in live.places else weights.specs[disk].shape
                self.specs.setdefault(unit, TensorSpec(shape, weights.specs[disk].stored))

    def origin(self, name: str) -> str | None:
        """Return the name itself."""
        return name

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor; one that is joined reads its parts."""
        place = self._places.get(name)
        if place is None or place.disk:
            return self._weights.open(place.disk if place and place.disk else name, device)
        return JoinedSource(self._weights, place.shape, place.spots, device)


class JoinedSource:
    """Reader of the rows of a tensor that is joined from parts. Only one part is open at a time.

    Args:
        weights: The weights with the parts.
        shape: Shape of the tensor.
        spots: Where the parts lie.
        device: Device of the rows.
    """

    def __init__(self, weights: Weights, shape: tuple[int, ...], spots: tuple[Spot, ...], device: torch.device) -> None:
        self._weights, self._spots, self._device = weights, spots, device
        self._height = shape[-2] if len(shape) > 1 else math.prod(shape)
        self._open: tuple[str, Source] | None = None
        self._turned: tuple[Spot, Tensor] | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop."""
        for spot in self._spots:
            top = (spot.expert or 0) * self._height + spot.rows[0]
            low, high = max(start, top), min(stop, top + spot.rows[1] - spot.rows[0])
            if low < high:
                out[low - start : high - start, slice(*spot.cols)] = self._part(spot, low - top, high - top)

    def _part(self, spot: Spot, low: int, high: int) -> Tensor:
        """Return rows low..high of a part."""
        width = spot.cols[1] - spot.cols[0]
        if not spot.swap:
            return self._rows(spot.disk, spot.row + low, spot.row + high)[:, spot.col : spot.col + width]
        if self._turned is None or self._turned[0] is not spot:
            self._turned = spot, self._rows(spot.disk, spot.row, spot.row + width)
        return self._turned[1][:, spot.col + low : spot.col + high].T

    def _rows(self, disk: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor on disk, read block by block as its reader expects."""
        spec = self._weights.specs[disk]
        if self._open is None or self._open[0] != disk:
            self._open = disk, self._weights.open(disk, self._device)
        rows = torch.empty(stop - start, spec.cols, dtype=torch.float32 if spec.is_float else spec.dtype, device=self._device)
        step = max(1, block_elements(self._device) // spec.cols)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            self._open[1].read(first, last, rows[first - start : last - start])
        return rows
