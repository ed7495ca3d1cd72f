"""RegMean: the weights that give each brick's outputs on each brick's own inputs, in the least-squares sense."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field

from workbench.merge.measuring.calibration import Calibrated
from workbench.merge.measuring.grams import Grams, collect
from workbench.merge.measuring.least_squares import average, is_linear, linear_deltas, merge_linear, norm_report, solver_bytes
from workbench.models.layout import Model
from workbench.models.texts import BATCH_TOKENS
from workbench.steps import Group, Laws, Measured, MergeContext, Prepared, register
from workbench.steps.fields import Real


@register
class RegMean(Calibrated):
    """For each linear layer the weights nearest to every brick's on what that layer reads in the brick's model, over calibration
    texts of the brick's task (Jin et al. 2023, RegMean). Norms, biases, embeddings, a tied head and fused experts are averaged by weight."""

    paper = "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849"
    formula = "Δ = (Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹,  Gᵢ = shrink(mean of x xᵀ) + ε·I"
    laws = Laws(zero_is_base=False, passes=2, memory="tensor", needs="texts")

    merge: Literal["regmean"]
    off_diagonal: Real = Field(0.5, ge=0, le=1)
    """Factor on what a Gram says of pairs of inputs: less than 1 keeps the result near the mean where texts are few. 0 weighs
    every input by itself."""
    ridge: Real = Field(1e-3, ge=0)
    """Added to every Gram's diagonal, relative to the mean of their diagonals."""

    def measure_bytes(self, model: Model) -> int:
        """The larger of the embeddings and one layer with its Grams, and the hidden states of all samples; a live model where
        transformers fuses experts."""
        layout = model.layout
        if any(".experts." in name for name in model.weights.specs):
            return 8 * sum(spec.numel for spec in model.weights.specs.values())
        specs = {name: spec for name, spec in model.weights.specs.items() if layout.layer(name) in (None, 0)}
        layer = [spec for name, spec in specs.items() if layout.layer(name) == 0]
        outside = sum(4 * spec.numel for name, spec in specs.items() if layout.layer(name) is None)
        grams = sum(4 * size**2 for size in {spec.cols for spec in layer if len(spec.shape) == 2})
        width = min((spec.cols for spec in layer if len(spec.shape) == 2), default=1)
        rows = self.samples * min(self.max_length, 512) + BATCH_TOKENS
        return max(outside, sum(4 * spec.numel for spec in layer) + 2 * grams) + 4 * rows * width

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """The solver's."""
        return solver_bytes(model, tensor, bricks)

    def measure(self, context: MergeContext) -> Measured:
        """Every brick's Grams."""
        found = {brick: collect(context, brick, *self.rows(context, brick)) for brick in context.bricks}
        record = {brick: {"file": self.file(brick), **grams.record} for brick, grams in found.items()}
        return Measured(found, {"calibration": record})

    def report(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Norms of the result."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Solve a linear layer whose inputs were recorded, average anything else."""
        found: dict[str, Grams] = group.survey
        if not is_linear(group.model, group.tensor) or any(group.tensor not in found[brick].files for brick in group.bricks):
            return average(group, method="regmean")
        grams = [partial(found[b].gram, group.tensor, group.device, self.off_diagonal) for b in group.bricks]
        return merge_linear(group, linear_deltas(group), grams, self.ridge, method="regmean")
