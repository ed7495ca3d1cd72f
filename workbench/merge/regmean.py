"""RegMean: the weights whose outputs are closest to each brick's outputs on that brick's inputs, in the least-squares sense."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from workbench.merge.measuring.calibration import (
    Calibrated,
    average,
    is_linear,
    linear_deltas,
    merge_linear,
    norm_report,
    solve,
    solver_bytes,
)
from workbench.merge.measuring.forward import LayerDeltas, Walk, measured_in_order
from workbench.merge.measuring.grams import Grams, LayerInputs, collect, save_gram, sum_of_squares
from workbench.models.architecture import is_conv1d
from workbench.models.layout import Model
from workbench.steps import Group, Laws, Measured, MergeContext, Prepared, register
from workbench.steps.fields import Real

if TYPE_CHECKING:
    from torch import Tensor


@register
class RegMean(Calibrated):
    """The least-squares fit of each linear layer to the outputs of every brick's layer (Jin et al. 2023, RegMean).

    The inputs are those that the layer receives in the brick's model on calibration texts of the brick's task. Norms, biases,
    embeddings, a tied head and fused experts get the weighted mean.
    """

    paper = "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849"
    formula = "Δ = (Σ wᵢτᵢGᵢ)(Σ wᵢGᵢ)⁻¹,  Gᵢ = shrink(mean of x xᵀ) + ε·I"
    laws = Laws(zero_is_base=False, passes=2, memory="tensor", needs="texts")

    merge: Literal["regmean"]
    inputs_from: Literal["bricks", "merged"] = Field("bricks", alias="inputs")
    """`bricks`: each layer's inputs come from the brick's own model. `merged`: they passed through the merged layers before, so that
    layers are merged in forward order (RegMean++, arXiv 2508.03121)."""
    off_diagonal: Real = Field(0.5, ge=0, le=1)
    """Factor on the off-diagonal elements of each Gram matrix. A value below 1 keeps the result close to the mean when there are
    few texts; 0 uses the diagonal alone."""
    ridge: Real = Field(1e-3, ge=0)
    """Value added to the diagonal of each Gram matrix, relative to the mean of the diagonals."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `inputs` at its default, so that keys of steps without it stay the same."""
        fields: dict[str, Any] = handler(self)
        if self.inputs_from == "bricks":
            fields.pop("inputs_from", None)
            fields.pop("inputs", None)
        return fields

    def warnings(self, names: Sequence[str]) -> Iterator[str]:
        """Yield a warning for each file of texts that stands for several bricks."""
        for file, bricks in self.shared(names):
            yield (
                f"{file} calibrates {bricks}: with the same texts their Grams are almost equal, and RegMean is then close to the average; "
                "give each brick texts of its own task"
            )

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the embeddings or of one layer with its Grams, whichever is larger, and of all hidden states.

        In forward order, the hidden states of all bricks' texts are held. If transformers fuses the experts, the whole model is live: 8 bytes a parameter.
        """
        if any(".experts." in name for name in model.weights.specs):
            return 8 * sum(spec.numel for spec in model.weights.specs.values())
        sizes, texts = self.sizes(model), self.count if self.inputs_from == "merged" else 1
        return max(sizes.outside, sizes.layer + 8 * sizes.squares) + sizes.hidden * texts

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the solver's memory."""
        return solver_bytes(model, tensor, bricks)

    def measure(self, context: MergeContext) -> Measured:
        """Collect the Grams of each brick, or merge in forward order, or find either in the cache."""
        if self.inputs_from == "merged":
            return measured_in_order(self, context, _mean, partial(_solve, self.off_diagonal, self.ridge))
        by_brick = {brick: collect(context, brick, *self.rows(context, brick)) for brick in context.bricks}
        record = {brick: {"file": self.file(brick), **grams.record} for brick, grams in by_brick.items()}
        return Measured(by_brick, {"calibration": record})

    def report(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the norms of the solved tensors and the number of averaged ones."""
        return norm_report(notes)

    def prepare(self, group: Group) -> Prepared:
        """Solve a linear layer whose inputs were recorded; average any other tensor."""
        if isinstance(group.survey, LayerDeltas):
            return group.survey.prepared(group) if group.tensor in group.survey.files else average(group, method="regmean")
        by_brick: dict[str, Grams] = group.survey
        if not is_linear(group.model, group.tensor) or any(group.tensor not in by_brick[brick].files for brick in group.bricks):
            return average(group, method="regmean")
        grams = [partial(by_brick[b].gram, group.tensor, group.device, self.off_diagonal) for b in group.bricks]
        return merge_linear(group, linear_deltas(group), grams, self.ridge, method="regmean")


def _mean(walk: Walk, tensor: str) -> dict[str, float]:
    """Return each brick's share of the weighted mean, with which tensors that are not solved are merged."""
    weights = walk.weights(tensor)
    total = sum(weights.values())
    return {brick: weight / total for brick, weight in weights.items()}


def _solve(off_diagonal: float, ridge: float, walk: Walk, layer: int) -> None:
    """Solve the linear layers of a decoder layer, or the head after the last one, on what passed through the merged layers before."""
    solved: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(dir=walk.context.cache, prefix=".grams-") as name:
        by_brick = {brick: _grams(walk, layer, brick, Path(name) / str(i)) for i, brick in enumerate(walk.bricks)}
        readers = walk.readers(layer) if layer < len(walk.merged.layers) else {str(walk.merged.head): None}
        for tensor, module in readers.items():
            if any(tensor not in grams.files for grams in by_brick.values()):
                continue
            base = walk.base(tensor)
            flipped = module is not None and is_conv1d(module)
            deltas = [walk.weight(brick, tensor) - base for brick in by_brick]
            weights = list(walk.weights(tensor).values())
            grams = [partial(known.gram, tensor, base.device, off_diagonal) for known in by_brick.values()]
            delta = solve([d.T for d in deltas] if flipped else deltas, grams, weights, ridge)
            solved[tensor] = (delta.T if flipped else delta).double()
    walk.solved = solved


def _grams(walk: Walk, layer: int, brick: str, out: Path) -> Grams:
    """Measure a brick's Grams in one layer, or at the head, on inputs that passed through the merged layers before."""
    out.mkdir()
    files: dict[str, str] = {}
    data, hidden = walk.data[brick], walk.hidden[brick]
    if layer == len(walk.merged.layers):
        if walk.merged.head is not None and walk.changes(walk.merged.head):
            with walk.merged.loaded():
                states = [walk.merged.leave(batch, h)[batch.mask.bool()] for batch, h in zip(data, hidden, strict=True)]
            save_gram(sum_of_squares(states), sum(map(len, states)), walk.merged.head, brick, out)
            files[walk.merged.head] = f"{walk.merged.head}.safetensors"
        return Grams(out, files, {})
    stack, changed = walk.bricks[brick], walk.readers(layer)
    inputs = LayerInputs({name: module for name, module in stack.readers(layer).items() if name in changed}, sum_of_squares)
    with stack.loaded(layer), inputs:
        for i, batch in enumerate(data):
            stack.run(layer, hidden[i], walk.calls[brick][i][layer])
            inputs.add(batch.mask)
    for first, (gram, readers) in inputs.sums.items():
        save_gram(gram, inputs.tokens, first, brick, out)
        files |= dict.fromkeys(readers, f"{first}.safetensors")
    return Grams(out, files, {})
