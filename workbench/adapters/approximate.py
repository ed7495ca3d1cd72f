"""Conversion of a result to a PEFT adapter: low-rank updates of linear weights, and whole copies of other changed weights.

The live model, built without memory, tells which of its modules an adapter can update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import xxhash

from workbench.adapters.dense import UpdatedSource
from workbench.adapters.live import Joined, Place, live_places
from workbench.adapters.lora import PatchSource
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.layout import Model
from workbench.weights import lowrank
from workbench.weights.lowrank import Factors, low_rank_update, summed
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor


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
        factors: Update of a "lora" part, rounded to the written dtype; stacked for a stack of experts.
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
        self.joined, self.before = Joined(result.weights, self.live), Joined(base.weights, self.live)
        self._measured: dict[str, AdaptedPart] = {}
        self._distances: dict[str, float] = {}
        self._recent = lru_cache(maxsize=8)(
            self.part
        )  # the tensors on disk of one stack of experts are opened one after the other

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the base's tensors."""
        return self.base.weights.specs

    def origin(self, name: str) -> str | None:
        """Return the origin of a tensor, as the result reports it."""
        return self.result.weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open the base's tensor plus its update, or the result's tensor if the adapter saves it whole."""
        parts = {unit: self._recent(unit, device) for unit in self.live.units[name]}
        if all(part.kind == "whole" for part in parts.values()):
            return self.result.weights.open(name, device)
        patches = []
        for unit, part in parts.items():
            place = self.live.places.get(unit)
            if part.kind == "whole":  # beside updates of other tensors that are made of the same one on disk
                part = replace(part, factors=Factors.of_dense(self._delta(unit, device)[0]))
            if place is None or part.factors is None:
                continue
            for spot in place.all_spots:
                if spot.disk == name:
                    of = part.factors.of(spot.expert if place.matrices > 1 else None)
                    patch = Factors(of.left[slice(*spot.rows)], of.right[:, slice(*spot.cols)])
                    patches.append((spot.row, spot.col, patch.transposed() if spot.swap else patch))
        source = self.base.weights.open(name, device)
        return UpdatedSource(source, PatchSource(patches), self.specs[name], device) if patches else source

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
        """Return the part of the adapter that represents one tensor of `live.places`, and keep its error for `check_error`.

        Raises:
            WorkbenchError: If the tensor differs from the base and neither the policy nor the live model allows an adapter
                to hold it.
        """
        part = self._part(name, device)
        self._measured[name] = replace(part, factors=None)
        return part

    def _part(self, name: str, device: torch.device) -> AdaptedPart:
        if not self.before.specs[name].is_float:
            return AdaptedPart("same")
        place = self.live.places.get(name)
        disks = dict.fromkeys(spot.disk for spot in place.all_spots) if place else [name]
        updates = [low_rank_update(self.result.weights, self.base.weights, disk, device) for disk in disks]
        if all(update is not None and update.rank == 0 for update in updates):
            return AdaptedPart("same")
        update = updates[0] if place and place.disk and place.matrices == 1 else None
        takes = place is not None and self._takes_factors(place) and not self._is_saved_above(name, place, device)
        if update is not None and takes:
            factors = lowrank.reduced(update) if self.policy.rank is None else lowrank.truncated(update, self.policy.rank)
            if factors.rank == 0:
                return AdaptedPart("same")
            factors = self._round(factors)
            norm = math.sqrt(max(0.0, lowrank.inner(update, update)))
            difference = summed([(1.0, update), (-1.0, factors)])
            error = math.sqrt(max(0.0, lowrank.inner(difference, difference))) / norm if norm else 0.0
            return AdaptedPart("lora", factors, norm, error)
        if update is None and takes and place and (self.policy.embeddings or place.module not in self.live.ends):
            part = self._factored(name, place, device)
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

    def _is_saved_above(self, name: str, place: Place, device: torch.device) -> bool:
        """Return whether a parameter beside or above the module changes that PEFT can only save together with all below it."""
        if self.policy.rest != "save":
            return False
        inside = (n for n, module in self.live.loose.items() if f"{place.module}.".startswith(f"{module}."))
        return any(other != name and self.before.specs[other].is_float and self._distance(other, device) > 0 for other in inside)

    def _takes_factors(self, place: Place) -> bool:
        """Return whether a LoRA update can target the module.

        `fan_in_fan_out` is one flag per adapter, so a linear head next to Conv1D layers cannot be targeted and is saved whole.
        """
        if place.kind == "other":
            return False
        if place.kind == "embedding":
            return place.module in self.live.ends and self.live.head is None and not self.live.conv1d
        return place.kind == "conv1d" or not self.live.conv1d

    def _factored(self, name: str, place: Place, device: torch.device) -> AdaptedPart | None:
        """Factor a dense update, every expert of a stack on its own; return None if the policy asks for exact factors that save no space."""
        parts: list[Factors] = []
        total = lost = noise = 0.0
        rows = self.before.specs[name].rows // place.matrices
        seed = xxhash.xxh32_intdigest(name.encode())
        for index in range(place.matrices):
            delta, rounded = self._delta(name, device, index * rows, rows)
            norm = lowrank.squared(delta)
            if norm == 0:
                factors: Factors | None = Factors(delta[:, :0], delta[:0])
            elif self.policy.dense == "approximate":
                factors = lowrank.approximate(delta, self.policy.rank, self.policy.error, seed)
            else:
                factors = _exact_factors(delta, norm, seed)
            if factors is None:
                return None
            parts.append(self._round(factors))
            total, noise = total + norm, noise + rounded
            lost += lowrank.residual(delta, parts[-1])
        if total == 0:
            return AdaptedPart("same")
        noise = noise if self.policy.dense == "approximate" else 0.0
        factors = parts[0] if place.matrices == 1 else lowrank.stacked(parts)
        return AdaptedPart("lora", factors, math.sqrt(total), math.sqrt(lost / total), math.sqrt(noise / total))

    def _round(self, factors: Factors) -> Factors:
        """Round factors to the adapter's dtype."""
        dtype = self.policy.dtype
        return Factors(factors.left.to(dtype).float(), factors.right.to(dtype).float())

    def _delta(self, name: str, device: torch.device, first: int = 0, count: int | None = None) -> tuple[Tensor, float]:
        """Compute rows of result minus base, [rows, cols] float32, and the expected squared rounding error of a stored result."""
        computed = hasattr(self.result.weights, "current")  # a step computes its result in float32
        stored = torch.float32 if computed else self.joined.specs[name].dtype
        noise = 0.0
        spec = self.before.specs[name]
        count = spec.rows if count is None else count
        delta = torch.empty(count, spec.cols, device=device)
        sources, scratch = [weights.open(name, device) for weights in (self.joined, self.before)], buffer(spec, device)
        step = max(1, block_elements(device) // spec.cols)
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = matrix(scratch, start, stop, spec.cols)
            sources[0].read(first + start, first + stop, delta[start:stop])
            sources[1].read(first + start, first + stop, block)
            noise += rounding(delta[start:stop], stored)
            delta[start:stop].sub_(block)
        return delta, noise

    def _distance(self, name: str, device: torch.device) -> float:
        """Compute ‖result − base‖ of one tensor, block by block, once."""
        if name not in self._distances:
            spec, total = self.before.specs[name], 0.0
            sources = [weights.open(name, device) for weights in (self.joined, self.before)]
            buffers = [buffer(spec, device) for _ in sources]
            for start, stop in spec.blocks(block_elements(device)):
                result, base = (matrix(b, start, stop, spec.cols) for b in buffers)
                sources[0].read(start, stop, result)
                sources[1].read(start, stop, base)
                total += float(result.sub_(base).double().square().sum())
            self._distances[name] = math.sqrt(total)
        return self._distances[name]

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


def _exact_factors(delta: Tensor, total: float, seed: int) -> Factors | None:
    """Factor an update that is exactly low-rank, as spectral methods produce; return None if factors save no space.

    Args:
        delta: [rows, cols].
        total: ‖delta‖².
        seed: Seed of the sketches.
    """
    for rank in LOSSLESS_RANKS:
        left, values, right = lowrank.singular(delta, rank, seed)
        count = int((values > LOSSLESS * values[0] / 2).sum())
        if count * sum(delta.shape) >= delta.numel():
            return None
        factors = lowrank.balanced(left[:, :count], values[:count], right[:count])
        if math.sqrt(lowrank.residual(delta, factors) / total) <= LOSSLESS:
            return factors
    return None


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
