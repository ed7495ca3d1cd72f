"""Steps that scale the output of a set of neurons, lazily on the current weights."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.activations.sets import set_masks
from workbench.edit.scale_neurons import ScaleNeurons
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs, set_row
from workbench.run.kind import Kind, StepContext, StepResult
from workbench.weights.masks import ScaledWeights


class ScaleKind(Kind[ScaleNeurons]):
    """Steps that scale columns of feed-forward output projections."""

    def apply(self, step: ScaleNeurons, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the weights with the neurons' columns scaled.

        Raises:
            WorkbenchError: If the current weights have other neurons than the model that the set was chosen on.
        """
        neurons = context.resolved.neurons(step.neurons)
        masks = set_masks(neurons, current, f"{context.id}: {step.neurons}", only_out=True)
        masks = {name: mask for name, mask in masks.items() if not mask.empty}
        record = {"tensors": len(masks), "factor": step.factor, "neurons": set_row(step.neurons, neurons)}
        return StepResult(Model(ScaledWeights(current.weights, masks, step.factor), current.config), record, masks)

    def plan_row(
        self, step: ScaleNeurons, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add nothing but the row: the step streams, and reads no file besides the set."""
        return {"factor": step.factor, "neurons": set_row(step.neurons, resolved.neurons(step.neurons))}, model


KIND = ScaleKind()
