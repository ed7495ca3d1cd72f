"""What a PEFT adapter can hold of a result: low-rank updates of linear weights, every other changed weight whole."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.layout import Model
from workbench.names import HEADS, live_module
from workbench.weights import svd
from workbench.weights.lowrank import Factors, LowRankSum, low_rank_update, summed
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, load, matrix

# Relative error in float32 up to which a dense update counts as the product that it is, and the ranks that are tried.
LOSSLESS, LOSSLESS_RANKS = 2e-6, (64, 256)
Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the base stands in the live model: module, its kind, the parameter's name in it."""

    module: str
    kind: Kind
    parameter: str


@dataclass(frozen=True)
class Live:
    """The live model's modules, as far as adapters need them.

    Attributes:
        places: Tensor of the base -> its place; none where transformers fuses, splits or reshapes the tensor.
        modules: All module names.
        ends: Modules of the input embeddings and the head.
        head: The head's module where it shares the input embeddings' weight, else None.
    """

    places: Mapping[str, Place]
    modules: frozenset[str]
    ends: frozenset[str]
    head: str | None

    @property
    def conv1d(self) -> bool:
        """Whether the base stores its linear weights as [in, out]."""
        return any(place.kind == "conv1d" for place in self.places.values())


def live_places(model: Model) -> Live:
    """Build the model without memory for its weights and find every tensor's module. Errors: not a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config), "utf-8")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                live = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:
            raise WorkbenchError(
                f"config.json: model_type {model.config.get('model_type')} is not a decoder-only language model of transformers",
                "An adapter names the modules of one: write `output: {form: checkpoint}`.",
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
            if owner not in HEADS or id(last) not in names:
                continue
            module = names[id(last)]  # GPT-NeoX's "embed_out" is "lm_head" in transformers 5
        held = dict(modules[module].named_parameters(recurse=False)).get(parameter)
        if held is not None and tuple(held.shape) == spec.shape:
            places[name] = Place(module, _kind(modules[module]) if parameter == "weight" else "other", parameter)
    ends = frozenset(names[id(module)] for module in (first, last) if id(module) in names)
    stored = {place.module for place in places.values()}
    tied = bool(getattr(live.config, "tie_word_embeddings", False)) and id(last) in names and names[id(last)] not in stored
    return Live(places, frozenset(modules), ends, names[id(last)] if tied else None)


def _kind(module: torch.nn.Module) -> Kind:
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


@dataclass(frozen=True)
class Policy:
    """How a result becomes an adapter.

    Attributes:
        rank: Largest rank of an update; None: no limit.
        error: Relative error of each tensor that is good enough for a smaller rank; 0: the rank is `rank`.
        dtype: Of the written factors.
        dense: What becomes of a linear weight whose update is not a product of factors: an approximation, or, where it has
            no low rank after all, the whole weight.
        embeddings: Whether input embeddings and head get low-rank updates too, where they are not products already.
        rest: What becomes of changed weights that are no linear layer's: saved whole, left at the base's values, or an error.
    """

    rank: int | None = None
    error: float = 0.0
    dtype: torch.dtype = torch.float32
    dense: Literal["approximate", "whole"] = "whole"
    embeddings: bool = False
    rest: Literal["save", "drop", "refuse"] = "save"


@dataclass(frozen=True)
class Part:
    """What an adapter holds of one tensor.

    Attributes:
        kind: "same" as the base, "lora", saved "whole", or "dropped".
        factors: The update of a "lora" part, rounded to the dtype that is written.
        norm: ‖Δ‖, Frobenius, of result minus base.
        error: ‖Δ − update‖ / ‖Δ‖.
        rounding: ‖ε‖ / ‖Δ‖ for the rounding ε of a fine-tune's stored weights, as expected from their dtype: an error of that
            size is noise that no rank removes.
    """

    kind: Literal["same", "lora", "whole", "dropped"]
    factors: Factors | None = None
    norm: float = 0.0
    error: float = 0.0
    rounding: float = 0.0


class AdaptedWeights:
    """The base plus an adapter of a result: the model that base and written adapter make together. Implements `Weights`.

    Args:
        result: Weights of the base's names and shapes: a merge, or a fine-tuned checkpoint.
        base: What the adapter will be put on.
        policy: Ranks, and what is saved whole.
        live: The live model's modules; found when first needed where omitted.
    """

    def __init__(self, result: Model, base: Model, policy: Policy, live: Live | None = None) -> None:
        self.result, self.base, self.policy = result, base, policy
        self.live = live or live_places(base)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's."""
        return self.base.weights.specs

    def origin(self, name: str) -> str | None:
        """As in the result."""
        return self.result.weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """The base's tensor plus the update, or the result's tensor where it is saved whole."""
        part = self.part(name, device)
        if part.kind == "whole":
            return self.result.weights.open(name, device)
        if part.factors is None:
            return self.base.weights.open(name, device)
        return LowRankSum(self.base.weights, {name: part.factors}).open(name, device)

    def part(self, name: str, device: torch.device) -> Part:
        """What the adapter holds of one tensor. Errors: a changed weight that the policy or the live model has no place for."""
        if not self.specs[name].is_float:
            return Part("same")
        update = low_rank_update(self.result.weights, self.base.weights, name, device)
        if update is not None and update.rank == 0:
            return Part("same")
        place = self.live.places.get(name)
        if update is not None and place and self._takes_factors(place):
            return self._from_factors(update)
        if update is None and place and self._is_approximated(place):
            part = self._from_dense(name, device) if self.policy.dense == "approximate" else self._without_loss(name, device)
            if part is not None:
                return part
        norm = self._distance(name, device)
        if norm == 0:
            return Part("same")
        if self.policy.rest == "drop":
            return Part("dropped", None, norm, 1.0)
        if self.policy.rest == "refuse" or place is None:
            raise self._no_place(name, place)
        return Part("whole", None, norm)

    def _takes_factors(self, place: Place) -> bool:
        """A mixed layout (a linear head beside Conv1D) is saved whole, since `fan_in_fan_out` is one flag an adapter."""
        if place.kind == "embedding":
            return place.module in self.live.ends and self.live.head is None and not self.live.conv1d
        return place.kind == "conv1d" or (place.kind == "linear" and not self.live.conv1d)

    def _is_approximated(self, place: Place) -> bool:
        if not self._takes_factors(place):
            return False
        return self.policy.embeddings or place.module not in self.live.ends

    def _from_factors(self, update: Factors) -> Part:
        kept = svd.reduced(update) if self.policy.rank is None else svd.truncated(update, self.policy.rank)
        if kept.rank == 0:
            return Part("same")
        kept = self._rounded(kept)
        norm = math.sqrt(max(0.0, svd.inner(update, update)))
        lost = summed([(1.0, update), (-1.0, kept)])
        error = math.sqrt(max(0.0, svd.inner(lost, lost))) / norm if norm else 0.0
        return Part("lora", kept, norm, error)

    def _from_dense(self, name: str, device: torch.device) -> Part:
        delta, noise = self._delta(name, device)
        total = svd.squared(delta)
        if total == 0:
            return Part("same")
        seed = xxhash.xxh32_intdigest(name.encode())
        kept = self._rounded(svd.approximate(delta, self.policy.rank, self.policy.error, seed))
        return Part("lora", kept, math.sqrt(total), math.sqrt(svd.residual(delta, kept) / total), math.sqrt(noise / total))

    def _without_loss(self, name: str, device: torch.device) -> Part | None:
        """A dense update of a low rank all the same, as spectral methods give: its factors; None where they would not be smaller."""
        delta, _ = self._delta(name, device)
        total = svd.squared(delta)
        if total == 0:
            return Part("same")
        for rank in LOSSLESS_RANKS:
            left, values, right = svd.singular(delta, rank, xxhash.xxh32_intdigest(name.encode()))
            count = int((values > LOSSLESS * values[0] / 2).sum())
            if count * sum(delta.shape) >= delta.numel():
                return None
            found = svd.balanced(left[:, :count], values[:count], right[:count])
            if math.sqrt(svd.residual(delta, found) / total) <= LOSSLESS:
                kept = self._rounded(found)
                return Part("lora", kept, math.sqrt(total), math.sqrt(svd.residual(delta, kept) / total))
        return None

    def _rounded(self, factors: Factors) -> Factors:
        dtype = self.policy.dtype
        return Factors(factors.left.to(dtype).float(), factors.right.to(dtype).float())

    def _delta(self, name: str, device: torch.device) -> tuple[Tensor, float]:
        """Result minus base, [rows, cols], float32; and the expected square of its rounding, where the result is stored."""
        computed = hasattr(self.result.weights, "current")  # by a step, in float32
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
        """‖result − base‖ of one tensor, block by block."""
        spec, total = self.specs[name], 0.0
        sources = [weights.open(name, device) for weights in (self.result.weights, self.base.weights)]
        rooms = [buffer(spec, device) for _ in sources]
        for start, stop in spec.blocks(block_elements(device)):
            ours, theirs = (matrix(room, start, stop, spec.cols) for room in rooms)
            sources[0].read(start, stop, ours)
            sources[1].read(start, stop, theirs)
            total += float(ours.sub_(theirs).double().square().sum())
        return math.sqrt(total)

    def _no_place(self, name: str, place: Place | None) -> WorkbenchError:
        if place is None:
            return WorkbenchError(
                f"{name} differs from the base, and transformers' model has no module that holds it alone: "
                "an adapter cannot carry it",
                "Keep a checkpoint (`output: {form: checkpoint}`), or leave such weights out (`brick extract --rest drop`).",
            )
        return WorkbenchError(
            f"{name} differs from the base and is no weight of a linear layer",
            "--rest save keeps such weights whole in the adapter (modules_to_save), --rest drop leaves them out.",
        )


def rounding(values: Tensor, dtype: torch.dtype) -> float:
    """Expected Σ ε² of numbers that were rounded to 16 bits: ε is uniform over one unit in the last place, so ulp² / 12 each."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    exponents = torch.frexp(values)[1]  # |x| in [2^(e−1), 2^e): one unit is eps · 2^(e−1)
    units = torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponents - 1)
    return float(units.masked_fill_(values == 0, 0.0).double().square().sum()) / 12
