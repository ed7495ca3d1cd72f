"""AIM: a sum of deltas, smaller in the input channels that the base uses most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.activations.sets import read_pair
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.results import Result
from workbench.merge.measuring.calibration import ReadsTexts, by_pattern, is_conv1d
from workbench.merge.measuring.layers import INDEX, InputWalk, TextsRead, in_cache
from workbench.models.layout import Model
from workbench.steps import Block, Combination, Group, Laws, Measured, MergeContext, OverlapWeighted, Prepared, register
from workbench.steps.fields import BrickEntry, Bricks, Number, Real
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

_MAGNITUDES = "magnitudes.safetensors"


class MagnitudeIndex(Result):
    """Index of magnitudes in the cache."""

    record: TextsRead
    """How the texts were read."""


@register
class Aim(OverlapWeighted, ReadsTexts):
    """A sum of deltas, damped in the input channels that the base uses most (Nobari et al. 2025, activation-informed merging).

    A channel's use is the mean magnitude of a linear layer's input in the base on the calibration texts. Tensors without such inputs
    (norms, biases, embeddings, a tied head, fused experts) get the plain sum. To damp another method, merge with it in a recipe, and
    make that recipe the only brick.
    """

    paper = "Nobari et al. 2025, Activation-informed merging of large language models, arXiv 2502.02421"
    formula = "Δ = λ Σ wᵢτᵢ · diag(1 − (1 − ω) aⱼ / maxⱼ aⱼ),  aⱼ = mean |xⱼ| over the tokens of the texts, in the base"
    laws = Laws(linear_in_weight=True, single_is_identity=False, memory="tensor", needs="texts")

    merge: Literal["aim"]
    bricks: Bricks[BrickEntry] | None = None
    """Mapping of brick name to weight. A list: each has weight 1. Default: all bricks."""
    calibration: str
    """JSONL file of texts that the base reads, relative to the project: {"prompt":, "completion":} (or response, answer, target) or
    {"text":} a line. They should show what the merged model must keep."""
    lam: Number = Field(1.0, alias="lambda")
    """Scale of the sum."""
    omega: Real = Field(0.2, ge=0, le=1)
    """Share ω that is left of the sum in a layer's most used channel. 1 damps nothing."""

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the embeddings or of one layer, whichever is larger, and of the hidden states of all texts.

        If transformers fuses the experts, the whole model is live: 8 bytes a parameter.
        """
        if any(".experts." in name for name in model.weights.specs):
            return 8 * sum(spec.numel for spec in model.weights.specs.values())
        sizes = self.sizes(model)
        return max(sizes.outside, sizes.layer) + sizes.hidden

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return 0: blocks are damped as they pass."""
        return 0

    def measure(self, context: MergeContext) -> Measured:
        """Measure the magnitudes of the base's inputs, or find them in the cache."""
        rows, key = self.rows_of(self.calibration, context, "")
        place = context.cache / "magnitudes" / key
        index = in_cache(place, lambda out: _measure(InputWalk(context, "", rows, _magnitudes), out), MagnitudeIndex)
        _, means = read_pair(place, INDEX, _MAGNITUDES, str(place), f"Delete {place}; the next run measures it again.")
        return Measured(means, {"calibration": {"file": self.calibration, "texts": len(rows), **index.record.to_dict()}})

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return the number of damped tensors, and which tensors got the plain sum."""
        return {
            "damped": sum("damped" in note for note in notes.values()),
            "summed": by_pattern(name for name, note in sorted(notes.items()) if "damped" not in note),
        }

    def prepare(self, group: Group) -> Prepared:
        """Return the damped sum of a linear layer whose inputs were measured, and the plain sum of any other tensor."""
        lam, means = group.value("lam"), group.survey.get(group.tensor)
        weights = [lam * weight for weight in group.values("weight")]
        if means is None or self.omega == 1:
            group.notes[group.tensor] = {}
            return Combination(weights)
        group.notes[group.tensor] = {"damped": True}
        rows = is_conv1d(group.model, group.tensor)
        return _damped(weights, kept_share(means, self.omega).to(group.device), rows)


def kept_share(means: Tensor, omega: float) -> Tensor:
    """Return the share of the sum that each input channel keeps [in]: 1 − (1 − ω) a / max a (AIM, eq. 4); 1 where no channel is used."""
    largest = means.max()
    return 1 - (1 - omega) * means / largest if largest > 0 else torch.ones_like(means)


def _damped(weights: Sequence[float], share: Tensor, rows: bool) -> Callable[[Block], Tensor]:
    """Return a function that computes the damped sum of a block; `rows` if the tensor is stored as [in, out]."""

    def delta(block: Block) -> Tensor:
        total = block.deltas[0].mul(weights[0])
        for one, weight in zip(block.deltas[1:], weights[1:], strict=True):
            total.add_(one.mul_(weight))
        return total.mul_(share[block.start : block.start + total.shape[0], None] if rows else share)

    return delta


def _magnitudes(parts: Sequence[Tensor]) -> Tensor:
    """Return Σ |x| [in] over all rows x of the parts [row, in], in float32."""
    return torch.stack([part.float().abs().sum(0) for part in parts]).sum(0)


def _measure(walk: InputWalk, out: Path) -> MagnitudeIndex:
    """Write the mean magnitude [in] of the inputs of each linear layer, by tensor name; return the index."""
    means: dict[str, Tensor] = {}
    for total, readers in walk:
        if not bool(torch.isfinite(total).all()):
            raise WorkbenchError(
                f"the base's inputs of {readers[0]} on the calibration texts are NaN or infinite", "Check the base's files."
            )
        means |= {name: (total / walk.tokens).cpu() for name in readers}
    save_tensors(means, out / _MAGNITUDES)
    return MagnitudeIndex(record=walk.record)
