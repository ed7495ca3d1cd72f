"""Where a mixture-of-experts model keeps what belongs to one expert, proven against the model that transformers builds.

No table of names: transformers builds the model without weights twice, with as many experts as config.json says and with one more.
Parameters that differ in shape are the experts', and the axis that differs says along which they lie. What is on disk follows from the
names that transformers gives the tensors in that model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import WorkbenchError
from workbench.grow.expansion.parts import check_places, check_shapes, text_config, with_text
from workbench.models.conversion import live_names
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config, skeleton
from workbench.steps import Axis, Grown
from workbench.weights.specs import TensorSpec

COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts", "num_routed_experts")
"""Fields of config.json that say how many experts a layer has."""
TAKEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token", "top_k_experts")
"""Fields that say how many of them a token takes."""
GROUPS = ("n_group", "num_expert_group")
"""Fields that split the experts into groups of which the router first chooses some."""
_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertPlace:
    """What of a tensor belongs to which expert.

    Attributes:
        layer: The layer that it is in.
        number: The expert that has it for itself; None: it has a part for every expert, in order.
        columns: Whether those parts are columns; else they are rows of the row view.
        size: Rows, or columns, of one expert.
    """

    layer: int
    number: int | None = None
    columns: bool = False
    size: int = 1

    def index(self, experts: Sequence[int]) -> NDArray[np.int64]:
        """Its rows, or columns, of some experts."""
        return np.concatenate([np.arange(e * self.size, (e + 1) * self.size) for e in experts])

    def shape(self, spec: TensorSpec, count: int, old: int) -> tuple[int, ...]:
        """A shared tensor's shape with another number of experts."""
        axis = -1 if self.columns else 0
        shape = list(spec.shape)
        shape[axis] = shape[axis] // old * count
        return tuple(shape)


class Mixture:
    """The experts of a model.

    Attributes:
        count: How many a layer has.
        top_k: How many a token takes, as config.json says.
        places: Tensor on disk -> what of it belongs to experts; the other tensors depend on no expert.
        layers: Layers with experts, ascending.

    Errors: a model without experts, groups of experts, tensors whose dependence on the number of experts is not understood.
    """

    def __init__(self, model: Model, step: str) -> None:
        self.model, self.step = model, step
        self.parsed = parse_config(model.config).get_text_config().to_dict()
        kind = model.config.get("model_type")
        self.field = next((f for f in COUNTS if self.parsed.get(f)), None)
        if self.field is None:
            raise WorkbenchError(
                f"grow {step}: model_type {kind} has no experts: its config.json has none of {', '.join(COUNTS)}",
                "`grow: experts` makes a dense model a mixture.",
                2,
            )
        self.count = int(self.parsed[self.field])
        if groups := [f for f in GROUPS if (self.parsed.get(f) or 1) != 1]:
            raise WorkbenchError(
                f"grow {step}: {groups[0]} is {self.parsed[groups[0]]}: the router chooses groups of equal size before experts, "
                "which another number of experts would cut differently",
                "Models with one group are supported.",
                2,
            )
        self.taken = next((f for f in TAKEN if self.parsed.get(f)), None)
        self.top_k = int(self.parsed[self.taken]) if self.taken else 0
        self.places = self._find()
        self.layers = sorted({p.layer for p in self.places.values()})
        if not self.layers:
            raise WorkbenchError(
                f"grow {step}: model_type {kind} has no experts: no tensor depends on {self.field}",
                "`grow: experts` makes a dense model a mixture.",
                2,
            )
        self._check_numbers()

    def config(self, count: int, top_k: int | None = None) -> dict[str, Any]:
        """config.json with another number of experts, under every name that it has for it."""
        text = text_config(self.model.config)
        changes: dict[str, Any] = {}
        for fields, own, value in ((COUNTS, self.field, count), (TAKEN, self.taken, top_k)):
            if value is not None and own is not None:
                changes |= {f: value for f in fields if f == own or text.get(f) is not None}
        return with_text(self.model.config, changes)

    def _find(self) -> dict[str, ExpertPlace]:
        """The tensors that depend on experts."""
        specs, names = self.model.weights.specs, live_names(self.model.config, self.model.weights.specs)
        now, more = (
            {n: tuple(t.shape) for n, t in skeleton(json.dumps(c, sort_keys=True)).state_dict().items()}
            for c in (self.model.config, self.config(self.count + 1))
        )
        found: dict[str, ExpertPlace] = {}
        for name, live in names.items():
            grows = [n for n in live if more.get(n) != now[n]]
            number = _NUMBER.search(name)
            if not grows and not (number and any(_NUMBER.search(n) for n in live)):
                continue
            layer = self.model.layout.layer(name)
            if layer is None:
                raise self._unknown(name, "it stands in no layer")
            if number:
                found[name] = ExpertPlace(layer, int(number[0]))
            else:
                found[name] = self._shared(name, layer, specs[name], now[grows[0]], more.get(grows[0]))
        layers = {p.layer for p in found.values()}
        for name, spec in specs.items():
            if not spec.is_float and self.model.layout.layer(name) in layers and name not in found:
                raise self._unknown(name, f"it is of {spec.dtype}, and may hold numbers of experts")
        return found

    def _shared(self, name: str, layer: int, spec: TensorSpec, now: tuple[int, ...], more: tuple[int, ...] | None) -> ExpertPlace:
        """The place of a tensor that has a part for every expert."""
        if more is None or len(more) != len(now) or spec.shape != now:
            raise self._unknown(
                name, f"transformers builds {list(now)} with {self.count} experts, and this is {list(spec.shape)}"
            )
        axes = [i for i, (a, b) in enumerate(zip(now, more, strict=True)) if a != b]
        size = now[axes[0]] // self.count
        grown = (size * self.count, size * (self.count + 1))
        if len(axes) > 1 or (now[axes[0]], more[axes[0]]) != grown or 0 < axes[0] < len(now) - 1:
            raise self._unknown(
                name, f"transformers builds {list(now)} with {self.count} experts, and {list(more)} with one more"
            )
        if axes[0]:
            return ExpertPlace(layer, columns=True, size=size)
        return ExpertPlace(layer, size=spec.rows // self.count)

    def _check_numbers(self) -> None:
        """Experts with tensors of their own: each of them is there."""
        kinds: dict[str, set[int]] = {}
        for name, place in self.places.items():
            if place.number is not None:
                kinds.setdefault(_NUMBER.sub("*", name), set()).add(place.number)
        for kind, numbers in kinds.items():
            if numbers != set(range(self.count)):
                raise self._unknown(kind, f"experts {sorted(numbers)}, and {self.field} is {self.count}")

    def _unknown(self, name: str, why: str) -> WorkbenchError:
        return WorkbenchError(
            f"grow {self.step}: {name}: not understood which part of it is which expert's ({why})", "Report this architecture.", 2
        )

    def regrown(self, experts: Callable[[int], Sequence[int]]) -> dict[str, Grown]:
        """The tensors of a model whose experts are some of these, renumbered; an expert that is named twice is copied.

        Args:
            experts: Layer -> the old numbers of its experts, in their new order. The same number for every layer.
        """
        found: dict[str, Grown] = {}
        for name in self.model.layout.names:
            place = self.places.get(name)
            if place is None:
                found[name] = Grown(name)
                continue
            chosen = list(experts(place.layer))
            if place.number is None:
                found[name] = self.part(name, chosen)
                continue
            for i, position in enumerate(p for p, old in enumerate(chosen) if old == place.number):
                found[_NUMBER.sub(str(position), name)] = Grown(name, new=i > 0)
        return found

    def part(self, name: str, experts: Sequence[int], base: bool = False) -> Grown:
        """Some experts' parts of a tensor that all share, in the order given."""
        place, spec = self.places[name], self.model.weights.specs[name]
        axis = Axis(place.index(experts))
        shape = place.shape(spec, len(experts), self.count)
        return Grown(
            name, base=base, rows=None if place.columns else axis, cols=axis if place.columns else None, shape=shape, new=base
        )

    def of_expert(self, layer: int, number: int) -> list[str]:
        """The tensors that an expert has for itself."""
        return [n for n, p in self.places.items() if p.layer == layer and p.number == number]

    def shared(self, layer: int) -> list[str]:
        """The tensors that have a part for every expert of a layer: its router, and experts that lie in one tensor."""
        return [n for n, p in self.places.items() if p.layer == layer and p.number is None]

    def check(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> None:
        """Errors: tensors that do not make the model that transformers builds from a config.json."""
        check_places(config, specs, self.step)
        check_shapes(config, specs, self.step)


def numbered(name: str, number: int) -> str:
    """An expert's tensor under another expert's number."""
    return _NUMBER.sub(str(number), name)
