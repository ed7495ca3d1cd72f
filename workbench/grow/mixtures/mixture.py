"""The parts of a mixture-of-experts model's tensors that belong to one expert, derived from the model that transformers builds.

This needs no table of names. transformers builds the model without weights twice: with the number of experts in config.json, and
with one more. Parameters whose shapes differ belong to the experts, and the axis that differs is the axis of experts. The tensors
on disk follow from the names that transformers gives them in that model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import no_grad, np, torch
from workbench.ground.results import JsonObject, Number
from workbench.grow.expansion.parts import check_places, check_shapes, text_config, with_text
from workbench.models.architecture import EXPERT_COUNTS
from workbench.models.hooks import chosen, expert_modules, unread
from workbench.models.layout import Model
from workbench.models.live import live_names
from workbench.models.skeleton import parse_config, skeleton
from workbench.models.texts import TextRow, batches
from workbench.steps import Axis, Grown
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel


TAKEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token", "top_k_experts")
"""Fields for the number of experts that the router selects for each token."""
GROUPS = ("n_group", "num_expert_group")
"""Fields for the number of groups of experts, from which the router first selects some."""
_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertPlace:
    """The part of a tensor that belongs to each expert.

    Attributes:
        layer: Layer of the tensor.
        number: Expert that owns the whole tensor; None if the tensor has a part for every expert, in order.
        columns: Whether the parts are columns; otherwise they are rows of the row view.
        size: Number of rows, or columns, of one expert.
    """

    layer: int
    number: int | None = None
    columns: bool = False
    size: int = 1

    def index(self, experts: Sequence[int]) -> NDArray[np.int64]:
        """Return the indices of the rows, or columns, of some experts."""
        return np.concatenate([np.arange(e * self.size, (e + 1) * self.size) for e in experts])

    def shape(self, spec: TensorSpec, count: int, old: int) -> tuple[int, ...]:
        """Return the shape of a shared tensor with `count` experts in place of `old`."""
        axis = -1 if self.columns else 0
        shape = list(spec.shape)
        shape[axis] = shape[axis] // old * count
        return tuple(shape)


class Mixture:
    """The experts of a mixture-of-experts model.

    Attributes:
        count: Number of experts of a layer.
        top_k: Number of experts that the router selects for each token, from config.json.
        places: Tensor on disk -> the parts that belong to experts. Other tensors do not depend on experts.
        layers: Layers with experts, in ascending order.

    Raises:
        WorkbenchError: If the model has no experts, has groups of experts, or has a tensor that depends on the number of experts
            in an unknown way.
    """

    def __init__(self, model: Model, step: str) -> None:
        self.model, self.step = model, step
        self.parsed = parse_config(model.config).get_text_config().to_dict()
        kind = model.config.get("model_type")
        self.field = next((f for f in EXPERT_COUNTS if self.parsed.get(f)), None)
        if self.field is None:
            raise InvalidRecipeError(
                f"grow {step}: model_type {kind} has no experts: config.json has none of the fields {', '.join(EXPERT_COUNTS)}",
                "`grow: experts` turns a dense model into a mixture.",
            )
        self.count = int(self.parsed[self.field])
        if groups := [f for f in GROUPS if (self.parsed.get(f) or 1) != 1]:
            raise InvalidRecipeError(
                f"grow {step}: {groups[0]} is {self.parsed[groups[0]]}: the router first selects groups of experts, and "
                "another number of experts would change the groups",
                "Models with one group are supported.",
            )
        self.taken = next((f for f in TAKEN if self.parsed.get(f)), None)
        self.top_k = int(self.parsed[self.taken]) if self.taken else 0
        self.places = self._find_places()
        self.layers = sorted({p.layer for p in self.places.values()})
        if not self.layers:
            raise InvalidRecipeError(
                f"grow {step}: model_type {kind} has no experts: no tensor depends on {self.field}",
                "`grow: experts` turns a dense model into a mixture.",
            )
        kinds: dict[str, set[int]] = {}  # of experts with tensors of their own, of which none may be missing
        for name, place in self.places.items():
            if place.number is not None:
                kinds.setdefault(_NUMBER.sub("*", name), set()).add(place.number)
        for pattern, numbers in kinds.items():
            if numbers != set(range(self.count)):
                reason = f"it exists for the experts {sorted(numbers)}, and {self.field} is {self.count}"
                raise self._unknown_tensor(pattern, reason)

    def config(self, count: int, top_k: int | None = None) -> dict[str, object]:
        """Return config.json with another number of experts, in every field that states it."""
        text = text_config(self.model.config)
        changes: dict[str, object] = {}
        for fields, own, value in ((EXPERT_COUNTS, self.field, count), (TAKEN, self.taken, top_k)):
            if value is not None and own is not None:
                changes |= {f: value for f in fields if f == own or text.get(f) is not None}
        return with_text(self.model.config, changes)

    def _find_places(self) -> dict[str, ExpertPlace]:
        """Return the places of the tensors that depend on experts."""
        specs, names = self.model.weights.specs, live_names(self.model.config, self.model.weights.specs)
        shapes, larger_shapes = (
            {n: tuple(t.shape) for n, t in skeleton(json.dumps(c, sort_keys=True)).state_dict().items()}
            for c in (self.model.config, self.config(self.count + 1))
        )
        places: dict[str, ExpertPlace] = {}
        for name, live in names.items():
            grows = [n for n in live if larger_shapes.get(n) != shapes[n]]
            number = _NUMBER.search(name)
            if not grows and not (number and any(_NUMBER.search(n) for n in live)):
                continue
            layer = self.model.layout.layer(name)
            if layer is None:
                raise self._unknown_tensor(name, "it is in no layer")
            if number:
                places[name] = ExpertPlace(layer, int(number[0]))
            else:
                places[name] = self._shared(name, layer, specs[name], shapes[grows[0]], larger_shapes.get(grows[0]))
        layers = {p.layer for p in places.values()}
        for name, spec in specs.items():
            if not spec.is_float and self.model.layout.layer(name) in layers and name not in places:
                raise self._unknown_tensor(name, f"its dtype is {spec.dtype}, so it may hold numbers of experts")
        return places

    def _shared(
        self, name: str, layer: int, spec: TensorSpec, shape: tuple[int, ...], larger_shape: tuple[int, ...] | None
    ) -> ExpertPlace:
        """Return the place of a tensor that has a part for every expert."""
        if larger_shape is None or len(larger_shape) != len(shape) or spec.shape != shape:
            raise self._unknown_tensor(
                name, f"transformers builds {list(shape)} with {self.count} experts, and its shape is {list(spec.shape)}"
            )
        axes = [i for i, (a, b) in enumerate(zip(shape, larger_shape, strict=True)) if a != b]
        size = shape[axes[0]] // self.count
        grown = (size * self.count, size * (self.count + 1))
        if len(axes) > 1 or (shape[axes[0]], larger_shape[axes[0]]) != grown or 0 < axes[0] < len(shape) - 1:
            raise self._unknown_tensor(
                name, f"transformers builds {list(shape)} with {self.count} experts, and {list(larger_shape)} with one more"
            )
        if axes[0]:
            return ExpertPlace(layer, columns=True, size=size)
        return ExpertPlace(layer, size=spec.rows // self.count)

    def _unknown_tensor(self, name: str, reason: str) -> WorkbenchError:
        return InvalidRecipeError(
            f"grow {self.step}: cannot tell which part of {name} belongs to which expert: {reason}", "Report this architecture."
        )

    def regrown(self, experts: Callable[[int], Sequence[int]]) -> dict[str, Grown]:
        """Return the tensors of a model with some of these experts, renumbered; an expert that is listed twice is copied.

        Args:
            experts: Function from a layer to the old numbers of its experts in their new order, as many in every layer.
        """
        tensors: dict[str, Grown] = {}
        for name in self.model.layout.names:
            place = self.places.get(name)
            if place is None:
                tensors[name] = Grown(name)
                continue
            chosen = list(experts(place.layer))
            if place.number is None:
                tensors[name] = self.part(name, chosen)
                continue
            for i, position in enumerate(p for p, old in enumerate(chosen) if old == place.number):
                tensors[_NUMBER.sub(str(position), name)] = Grown(name, new=i > 0)
        return tensors

    def part(self, name: str, experts: Sequence[int], base: bool = False) -> Grown:
        """Return the parts of some experts, in the given order, from a tensor that all experts share."""
        place, spec = self.places[name], self.model.weights.specs[name]
        axis = Axis(place.index(experts))
        shape = place.shape(spec, len(experts), self.count)
        return Grown(
            name, base=base, rows=None if place.columns else axis, cols=axis if place.columns else None, shape=shape, new=base
        )

    def check(self, config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> None:
        """Check that the tensors match the model that transformers builds from a config.json.

        Raises:
            WorkbenchError: If they do not.
        """
        check_places(config, specs, self.step)
        check_shapes(config, specs, self.step)


def numbered(name: str, number: int) -> str:
    """Return the tensor name of an expert with another expert's number."""
    return _NUMBER.sub(str(number), name)


@dataclass(frozen=True)
class Usage:
    """The distribution of tokens over the experts of a model.

    Attributes:
        layers: Layers with experts, in ascending order.
        shares: [layers, experts], float64: the share of all selections (`top_k` per token) that an expert gets; each row adds up
            to 1. Multiplied by `top_k`, it is the share of tokens that select the expert.
        entropy: [layers], bits: entropy of the experts' mean weights over tokens, normalized to add up to 1. It is log2(experts)
            if all experts have the same weight, and 0 if one expert has all of it.
        tokens: Number of tokens, without padding.
        top_k: Number of experts that the router selects for each token.
    """

    layers: tuple[int, ...]
    shares: Tensor
    entropy: Tensor
    tokens: int
    top_k: int

    def counts(self) -> UsageCounts:
        """Return the shares as numbers of four digits, as in records and documents."""
        return UsageCounts(
            tokens=self.tokens,
            top_k=self.top_k,
            layers=list(self.layers),
            usage=[[round(v, 4) for v in row] for row in self.shares.tolist()],
            mean=[round(v, 4) for v in self.shares.mean(0).tolist()],
            entropy=[round(v, 4) for v in self.entropy.tolist()],
        )


class UsageCounts(JsonObject):
    """Use of the experts of a mixture, as in the record of a step."""

    tokens: int
    """Number of tokens."""
    top_k: int
    """Number of experts that the router selects for each token."""
    layers: list[int]
    """Layers with experts, in ascending order."""
    usage: list[list[Number]]
    """By layer, share of all selections that each expert gets; a row adds up to 1."""
    mean: list[Number]
    """Mean share of each expert over the layers."""
    entropy: list[Number]
    """By layer, entropy of the experts' mean weights in bits."""


class _OfTexts(JsonObject):
    """The first fields of `ExpertsUsed`."""

    model: str
    """Recipe, run or model directory, as named on the command line."""
    texts: str
    """File of the texts."""
    samples: int
    """Number of texts that were read."""


class ExpertsUsed(UsageCounts, _OfTexts):
    """Use of the experts of a mixture on some texts."""


@no_grad
def usage(
    model: PreTrainedModel, rows: Sequence[TextRow], device: torch.device, progress: Callable[[int, int], None] = lambda *_: None
) -> Usage:
    """Count how often each expert is selected on some texts.

    The counts come from the model's own forward pass, after correction biases and groups.

    Args:
        model: The live model.
        rows: The texts as tokens.
        device: Device of the model.
        progress: Function that is called with (number of texts done, number of texts).

    Raises:
        WorkbenchError: If the model has no experts, or its experts do not receive (tokens, numbers, weights).
    """
    modules = expert_modules(model)
    counts = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    weights = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in modules.items()}
    tokens, done, top_k = 0, 0, 1
    for batch in batches(rows, device):
        with chosen(model, list(modules)) as selected:
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        is_token = batch.mask.flatten().bool()
        if unseen := [name for name, (index, _) in selected.items() if index.numel() % len(is_token)] or sorted(
            modules.keys() - selected.keys()
        ):
            raise unread(unseen[0], model)
        for name, (index, weight) in selected.items():
            count = modules[name][1]
            numbers, factors = (t.reshape(len(is_token), -1)[is_token].flatten().cpu() for t in (index, weight))
            top_k = len(numbers) // int(is_token.sum())
            existing = numbers < count  # higher numbers are experts that compute nothing
            counts[name] += torch.bincount(numbers[existing], minlength=count).double()
            weights[name].index_add_(0, numbers[existing], factors[existing].double())
        tokens, done = tokens + int(is_token.sum()), done + len(batch.tokens)
        progress(done, len(rows))
    order = sorted(modules, key=lambda name: modules[name][0])
    shares, mean = (torch.stack([sums[n] / sums[n].sum().clamp_min(1e-30) for n in order]) for sums in (counts, weights))
    entropy = -(mean * mean.clamp_min(1e-30).log2()).sum(1)
    return Usage(tuple(modules[n][0] for n in order), shares, entropy.clamp_min(0), tokens, top_k)
