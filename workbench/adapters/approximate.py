"""Conversion of a result to a PEFT adapter: low-rank updates of linear weights, and whole copies of other changed weights.

The live model, built without memory, tells which of its modules an adapter can update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import xxhash

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d, is_head_module, live_module
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config
from workbench.weights import lowrank
from workbench.weights.lowrank import Factors, LowRankSum, low_rank_update, summed
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, load, matrix

if TYPE_CHECKING:
    from torch import Tensor


Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Place:
    """Location of a base tensor in the live model: the module, its kind, and the parameter's name in it."""

    module: str
    kind: Kind
    parameter: str


@dataclass(frozen=True)
class Live:
    """The modules of a live model that adapters use.

    Attributes:
        places: Tensor of the base -> its place. Tensors that transformers fuses, splits or reshapes are not in it.
        modules: All module names.
        ends: Modules of the input embeddings and the head.
        head: The head's module if it shares the weight of the input embeddings, else None.
    """

    places: Mapping[str, Place]
    modules: frozenset[str]
    ends: frozenset[str]
    head: str | None

    @property
    def conv1d(self) -> bool:
        """True if the base stores its linear weights as [in, out]."""
        return any(place.kind == "conv1d" for place in self.places.values())


def live_places(model: Model) -> Live:
    """Build the model on the meta device and find the module of every tensor."""
    from transformers import AutoModelForCausalLM

    try:
        config = parse_config(model.config)
        with torch.device("meta"):
            live = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, WorkbenchError):
        raise WorkbenchError(
            f"config.json: model_type {model.config.get('model_type')} is not a decoder-only language model of transformers",
            "Adapters can only be written for such models: use `output: {form: checkpoint}`.",
        ) from None
    modules = dict(live.named_modules())
    names = {id(module): name for name, module in modules.items()}
    first, last = live.get_input_embeddings(), live.get_output_embeddings()
    places = {}
    for name, spec in model.weights.specs.items():
        owner, _, parameter = name.rpartition(".")
        try:
            module = live_module(f"{owner}.weight", modules)
        except WorkbenchError:
            if not is_head_module(owner) or id(last) not in names:
                continue
            module = names[id(last)]  # GPT-NeoX's "embed_out" is "lm_head" in transformers 5
        tensor = dict(modules[module].named_parameters(recurse=False)).get(parameter)
        if tensor is not None and tuple(tensor.shape) == spec.shape:
            places[name] = Place(module, _kind(modules[module]) if parameter == "weight" else "other", parameter)
    ends = frozenset(names[id(module)] for module in (first, last) if id(module) in names)
    stored = {place.module for place in places.values()}
    tied = bool(getattr(live.config, "tie_word_embeddings", False)) and id(last) in names and names[id(last)] not in stored
    return Live(places, frozenset(modules), ends, names[id(last)] if tied else None)


def _kind(module: torch.nn.Module) -> Kind:
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


# A dense update counts as exactly low-rank if its relative error in float32 is at most LOSSLESS at one of these ranks.
LOSSLESS, LOSSLESS_RANKS = 2e-6, (64, 256)
LARGE = 0.1
"""Relative error of an adapter above which there is a warning."""


@dataclass(frozen=True)
class Policy:
    """Options for converting a result to an adapter.

    Attributes:
        rank: Largest rank of an update; None sets no limit.
        error: Relative error per tensor at which a smaller rank is good enough; 0 always uses `rank`.
        dtype: Data type of the written factors.
        dense: Treatment of a linear weight whose update is dense: approximate it by a low-rank product, or save the whole
            weight. "whole" still writes factors if the update turns out to be exactly low-rank.
        embeddings: Whether to approximate dense updates of the input embeddings and the head, too.
        rest: Treatment of changed weights that do not belong to a linear layer: save them whole, drop the change, or raise
            an error.
        accept: Largest relative error of all updates together; a larger one raises an error.
    """

    rank: int | None = None
    error: float = 0.0
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    dense: Literal["approximate", "whole"] = "whole"
    embeddings: bool = False
    rest: Literal["save", "drop", "refuse"] = "save"
    accept: float = math.inf


@dataclass(frozen=True)
class AdaptedPart:
    """The part of an adapter that represents one tensor.

    Attributes:
        kind: "same" as the base, "lora", saved "whole", or "dropped".
        factors: Update of a "lora" part, rounded to the written dtype.
        norm: ‖Δ‖, the Frobenius norm of result minus base.
        error: ‖Δ − update‖ / ‖Δ‖.
        rounding: Expected ‖ε‖ / ‖Δ‖, where ε is the rounding error of a fine-tune's stored weights. No rank brings the error
            below this noise.
    """

    kind: Literal["same", "lora", "whole", "dropped"]
    factors: Factors | None = None
    norm: float = 0.0
    error: float = 0.0
    rounding: float = 0.0


class AdaptedWeights:
    """The base with the written adapter applied. Implements `Weights`."""

    def __init__(self, result: Model, base: Model, policy: Policy) -> None:
        self.result, self.base, self.policy = result, base, policy
        self.live = live_places(base)
        self._measured: dict[str, AdaptedPart] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the base's tensors."""
        return self.base.weights.specs

    def origin(self, name: str) -> str | None:
        """Return the origin of a tensor, as the result reports it."""
        return self.result.weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open the base's tensor plus its update, or the result's tensor if the adapter saves it whole."""
        part = self.part(name, device)
        if part.kind == "whole":
            return self.result.weights.open(name, device)
        if part.factors is None:
            return self.base.weights.open(name, device)
        return LowRankSum(self.base.weights, {name: part.factors}).open(name, device)

    def check_error(self) -> None:
        """Check the relative error of the tensors that have been computed, all together.

        Raises:
            WorkbenchError: If it is larger than the policy accepts.
        """
        norm, error = lost(self._measured)
        if not norm or error <= self.policy.accept * norm:
            return
        worst = max(self._measured, key=lambda name: self._measured[name].norm * self._measured[name].error)
        raise WorkbenchError(
            f"an adapter of rank {self.policy.rank} has a relative error of {error / norm:.2f}, expected at most {self.policy.accept:g}: most "
            f"is lost in {worst} ({self._measured[worst].error:.2f})",
            "Write a larger `rank` in the recipe's `output`, or `output: {form: checkpoint}`. To accept the error: "
            f"`output: {{form: adapter, rank: {self.policy.rank}, accept_error: {math.ceil(100 * error / norm) / 100:g}}}`.",
        )

    def part(self, name: str, device: torch.device) -> AdaptedPart:
        """Return the part of the adapter that represents one tensor, and keep its error for `check_error`.

        Raises:
            WorkbenchError: If the tensor differs from the base and neither the policy nor the live model allows an adapter
                to hold it.
        """
        part = self._part(name, device)
        self._measured[name] = replace(part, factors=None)
        return part

    def _part(self, name: str, device: torch.device) -> AdaptedPart:
        if not self.specs[name].is_float:
            return AdaptedPart("same")
        update = low_rank_update(self.result.weights, self.base.weights, name, device)
        if update is not None and update.rank == 0:
            return AdaptedPart("same")
        place = self.live.places.get(name)
        if update is not None and place and self._takes_factors(place):
            factors = lowrank.reduced(update) if self.policy.rank is None else lowrank.truncated(update, self.policy.rank)
            if factors.rank == 0:
                return AdaptedPart("same")
            factors = self._round(factors)
            norm = math.sqrt(max(0.0, lowrank.inner(update, update)))
            difference = summed([(1.0, update), (-1.0, factors)])
            error = math.sqrt(max(0.0, lowrank.inner(difference, difference))) / norm if norm else 0.0
            return AdaptedPart("lora", factors, norm, error)
        approximated = place is not None and (self.policy.embeddings or place.module not in self.live.ends)
        if update is None and place and approximated and self._takes_factors(place):
            part = self._from_dense(name, device) if self.policy.dense == "approximate" else self._exact_factors(name, device)
            if part is not None:
                return part
        norm = self._distance(name, device)
        if norm == 0:
            return AdaptedPart("same")
        if self.policy.rest == "drop":
            return AdaptedPart("dropped", None, norm, 1.0)
        if self.policy.rest == "refuse" or place is None:
            raise self._not_adaptable_error(name, place)
        return AdaptedPart("whole", None, norm)

    def _takes_factors(self, place: Place) -> bool:
        """Return whether a LoRA update can target the module.

        `fan_in_fan_out` is one flag per adapter, so a linear head next to Conv1D layers cannot be targeted and is saved whole.
        """
        if place.kind == "embedding":
            return place.module in self.live.ends and self.live.head is None and not self.live.conv1d
        return place.kind == "conv1d" or (place.kind == "linear" and not self.live.conv1d)

    def _from_dense(self, name: str, device: torch.device) -> AdaptedPart:
        """Return the part of a tensor whose update is dense, approximated at the policy's rank and error."""
        delta, noise = self._delta(name, device)
        total = lowrank.squared(delta)
        if total == 0:
            return AdaptedPart("same")
        seed = xxhash.xxh32_intdigest(name.encode())
        factors = self._round(lowrank.approximate(delta, self.policy.rank, self.policy.error, seed))
        error = math.sqrt(lowrank.residual(delta, factors) / total)
        return AdaptedPart("lora", factors, math.sqrt(total), error, math.sqrt(noise / total))

    def _exact_factors(self, name: str, device: torch.device) -> AdaptedPart | None:
        """Factor a dense update that is exactly low-rank, as spectral methods produce; return None if factors save no space."""
        delta, _ = self._delta(name, device)
        total = lowrank.squared(delta)
        if total == 0:
            return AdaptedPart("same")
        for rank in LOSSLESS_RANKS:
            left, values, right = lowrank.singular(delta, rank, xxhash.xxh32_intdigest(name.encode()))
            count = int((values > LOSSLESS * values[0] / 2).sum())
            if count * sum(delta.shape) >= delta.numel():
                return None
            factors = lowrank.balanced(left[:, :count], values[:count], right[:count])
            if math.sqrt(lowrank.residual(delta, factors) / total) <= LOSSLESS:
                factors = self._round(factors)
                return AdaptedPart("lora", factors, math.sqrt(total), math.sqrt(lowrank.residual(delta, factors) / total))
        return None

    def _round(self, factors: Factors) -> Factors:
        """Round factors to the adapter's dtype."""
        dtype = self.policy.dtype
        return Factors(factors.left.to(dtype).float(), factors.right.to(dtype).float())

    def _delta(self, name: str, device: torch.device) -> tuple[Tensor, float]:
        """Compute result minus base, [rows, cols] float32, and the expected squared rounding error of a stored result."""
        computed = hasattr(self.result.weights, "current")  # a step computes its result in float32
        stored = torch.float32 if computed else self.result.weights.specs[name].dtype
        noise = 0.0
        spec = self.specs[name]
        delta = load(self.result.weights, name, torch.float32, device).view(spec.rows, spec.cols)
        source, scratch = self.base.weights.open(name, device), buffer(spec, device)
        for start, stop in spec.blocks(block_elements(device)):
            block = matrix(scratch, start, stop, spec.cols)
            source.read(start, stop, block)
            noise += rounding(delta[start:stop], stored)
            delta[start:stop].sub_(block)
        return delta, noise

    def _distance(self, name: str, device: torch.device) -> float:
        """Compute ‖result − base‖ of one tensor, block by block."""
        spec, total = self.specs[name], 0.0
        sources = [weights.open(name, device) for weights in (self.result.weights, self.base.weights)]
        buffers = [buffer(spec, device) for _ in sources]
        for start, stop in spec.blocks(block_elements(device)):
            result, base = (matrix(b, start, stop, spec.cols) for b in buffers)
            sources[0].read(start, stop, result)
            sources[1].read(start, stop, base)
            total += float(result.sub_(base).double().square().sum())
        return math.sqrt(total)

    def _not_adaptable_error(self, name: str, place: Place | None) -> WorkbenchError:
        if place is None:
            return WorkbenchError(
                f"{name} differs from the base, but an adapter cannot hold it: transformers splits it, fuses it with other tensors "
                "or has no module for it",
                "Write a checkpoint instead (`output: {form: checkpoint}`), or drop such weights (`brick extract --rest drop`).",
            )
        return WorkbenchError(
            f"{name} differs from the base and is not the weight of a linear layer",
            "Use --rest save to store such weights whole in the adapter (modules_to_save), or --rest drop to leave them out.",
        )


def lost(parts: Mapping[str, AdaptedPart]) -> tuple[float, float]:
    """Return the norms of all updates together, and of what the adapter lacks of them. A dropped tensor counts as lost."""
    counted = [p for p in parts.values() if p.kind in ("lora", "dropped")]
    return math.hypot(*(p.norm for p in counted)), math.hypot(*(p.norm * p.error for p in counted))


def rounding(values: Tensor, dtype: torch.dtype) -> float:
    """Return the expected Σ ε² of numbers that were rounded to 16 bits.

    The error ε is uniform over one unit in the last place (ulp), so each number contributes ulp² / 12.

    Args:
        values: The rounded numbers.
        dtype: Data type that they are stored in; the result is 0 unless it is bfloat16 or float16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    exponents = torch.frexp(values)[1]  # |x| in [2^(e−1), 2^e), where one ulp is eps · 2^(e−1)
    units = torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponents - 1)
    return float(units.masked_fill_(values == 0, 0.0).double().square().sum()) / 12
