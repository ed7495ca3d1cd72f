"""What a PEFT adapter can hold of a result: low-rank updates of linear weights, every other changed weight whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from torch import Tensor

from workbench.adapters.modules import Live, Place, live_places
from workbench.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.weights import svd
from workbench.weights.lowrank import Factors, LowRankSum, low_rank_update, summed
from workbench.weights.specs import Source, TensorSpec, block_elements, buffer, load, matrix

# Relative error in float32 up to which a dense update counts as the product that it is, and the ranks that are tried.
LOSSLESS, LOSSLESS_RANKS = 2e-6, (64, 256)


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
class AdaptedPart:
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

    def part(self, name: str, device: torch.device) -> AdaptedPart:
        """What the adapter holds of one tensor. Errors: a changed weight that the policy or the live model has no place for."""
        if not self.specs[name].is_float:
            return AdaptedPart("same")
        update = low_rank_update(self.result.weights, self.base.weights, name, device)
        if update is not None and update.rank == 0:
            return AdaptedPart("same")
        place = self.live.places.get(name)
        if update is not None and place and self._takes_factors(place):
            return self._from_factors(update)
        if update is None and place and self._is_approximated(place):
            part = self._from_dense(name, device) if self.policy.dense == "approximate" else self._without_loss(name, device)
            if part is not None:
                return part
        norm = self._distance(name, device)
        if norm == 0:
            return AdaptedPart("same")
        if self.policy.rest == "drop":
            return AdaptedPart("dropped", None, norm, 1.0)
        if self.policy.rest == "refuse" or place is None:
            raise self._no_place(name, place)
        return AdaptedPart("whole", None, norm)

    def _takes_factors(self, place: Place) -> bool:
        """A mixed layout (a linear head beside Conv1D) is saved whole, since `fan_in_fan_out` is one flag an adapter."""
        if place.kind == "embedding":
            return place.module in self.live.ends and self.live.head is None and not self.live.conv1d
        return place.kind == "conv1d" or (place.kind == "linear" and not self.live.conv1d)

    def _is_approximated(self, place: Place) -> bool:
        if not self._takes_factors(place):
            return False
        return self.policy.embeddings or place.module not in self.live.ends

    def _from_factors(self, update: Factors) -> AdaptedPart:
        kept = svd.reduced(update) if self.policy.rank is None else svd.truncated(update, self.policy.rank)
        if kept.rank == 0:
            return AdaptedPart("same")
        kept = self._rounded(kept)
        norm = math.sqrt(max(0.0, svd.inner(update, update)))
        lost = summed([(1.0, update), (-1.0, kept)])
        error = math.sqrt(max(0.0, svd.inner(lost, lost))) / norm if norm else 0.0
        return AdaptedPart("lora", kept, norm, error)

    def _from_dense(self, name: str, device: torch.device) -> AdaptedPart:
        delta, noise = self._delta(name, device)
        total = svd.squared(delta)
        if total == 0:
            return AdaptedPart("same")
        seed = xxhash.xxh32_intdigest(name.encode())
        kept = self._rounded(svd.approximate(delta, self.policy.rank, self.policy.error, seed))
        return AdaptedPart("lora", kept, math.sqrt(total), math.sqrt(svd.residual(delta, kept) / total), math.sqrt(noise / total))

    def _without_loss(self, name: str, device: torch.device) -> AdaptedPart | None:
        """A dense update of a low rank all the same, as spectral methods give: its factors; None where they would not be smaller."""
        delta, _ = self._delta(name, device)
        total = svd.squared(delta)
        if total == 0:
            return AdaptedPart("same")
        for rank in LOSSLESS_RANKS:
            left, values, right = svd.singular(delta, rank, xxhash.xxh32_intdigest(name.encode()))
            count = int((values > LOSSLESS * values[0] / 2).sum())
            if count * sum(delta.shape) >= delta.numel():
                return None
            found = svd.balanced(left[:, :count], values[:count], right[:count])
            if math.sqrt(svd.residual(delta, found) / total) <= LOSSLESS:
                kept = self._rounded(found)
                return AdaptedPart("lora", kept, math.sqrt(total), math.sqrt(svd.residual(delta, kept) / total))
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
