"""RegMean: the weights whose outputs are closest to each brick's outputs on that brick's inputs, in the least-squares sense."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from workbench.merge.measuring.calibration import (
    Calibrated,
    average,
    is_linear,
    linear_deltas,
    merge_linear,
    norm_report,
    solver_bytes,
)
from workbench.merge.measuring.layers import Grams, collect
from workbench.models.layout import Model
from workbench.steps import Group, Laws, Measured, MergeContext, Prepared, register
from workbench.steps.fields import Real


@register
class RegMean(Calibrated):
    """The least-squares fit of each linear layer to the outputs of every brick's layer (Jin et al. 2023, RegMean).

    The inputs are those that the layer receives in the brick's model on calibration texts of the brick's task. Norms, biases,
    embeddings, a tied head and fused experts get the weighted mean.
    """

    paper = "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849"
    formula = "Δ = (Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹,  Gᵢ = shrink(mean of x xᵀ) + ε·I,  ε = ridge · mean diag(Σ wⱼGⱼ / Σ wⱼ)"
    laws = Laws(zero_is_base=False, passes=2, memory="tensor", needs="texts")

    same_texts = "with the same texts their Grams are almost equal, and RegMean is then close to the average"

    merge: Literal["regmean"]
    off_diagonal: Real = Field(0.5, ge=0, le=1)
    """Factor on the off-diagonal elements of each Gram matrix. A value below 1 keeps the result close to the mean when there are
    few texts; 0 uses the diagonal alone."""
    ridge: Real = Field(1e-3, ge=0)
    """Value added to the diagonal of each Gram matrix, the same for all bricks, relative to the mean diagonal of their weighted mean."""

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the embeddings or of one layer with its Grams, whichever is larger, and of all hidden states.

        If transformers fuses the experts, the whole model is live: 8 bytes a parameter.
        """
        if any(".experts." in name for name in model.weights.specs):
            return 8 * sum(spec.numel for spec in model.weights.specs.values())
        sizes = self.sizes(model)
        return max(sizes.outside, sizes.layer + 8 * sizes.squares) + sizes.hidden

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the solver's memory."""
        return solver_bytes(model, tensor, bricks)

    def measure(self, context: MergeContext) -> Measured:
        """Collect the Grams of each brick, or find them in the cache."""
        by_brick = {brick: collect(context, brick, *self.rows(context, brick)) for brick in context.bricks}
        record = {brick: {"file": self.file(brick), **grams.record.to_dict()} for brick, grams in by_brick.items()}
        return Measured(by_brick, {"calibration": record})

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return the norms of the solved tensors and the number of averaged ones."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Solve a linear layer whose inputs were recorded; average any other tensor."""
        by_brick: dict[str, Grams] = group.survey
        if not is_linear(group.model, group.tensor) or any(group.tensor not in by_brick[brick].files for brick in group.bricks):
            return average(group, method="regmean")
        grams = [partial(by_brick[b].gram, group.tensor, group.device, self.off_diagonal) for b in group.bricks]
        return merge_linear(group, linear_deltas(group), grams, self.ridge, method="regmean")
