"""Scale neurons: switch a set of neurons off, or amplify it, in the weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from workbench.steps import KeyContext, Step, register
from workbench.steps.fields import Real


@register
class ScaleNeurons(Step):
    """Scale what a set of neurons adds to the output: 0 switches them off, 2 amplifies them.

    The step scales the neurons' columns of the feed-forward output projection in the current weights. For a set of experts, it
    scales each expert's output matrix. It teaches no facts and needs no live model. `output: {form: adapter}` can hold the result; a
    layer's rank is at most the number of its neurons in the set.
    """

    paper: ClassVar[str] = (
        "Xiao et al. 2024, Configurable Foundation Models, arXiv 2409.02877, section 4; Dai et al. 2022, arXiv 2104.08696"
    )
    formula: ClassVar[str] = "W_out[:, S] ↦ factor · W_out[:, S]"
    kind = "scale_neurons"
    verb = "edit"

    edit: Literal["scale_neurons"]
    neurons: str
    """Directory of a set of neurons (`neurons.json`), relative to the project. The set must have been chosen on the recipe's base."""
    factor: Real = Field(0.0, allow_inf_nan=False)
    """Factor of the neurons' output: 0 switches them off, 1 changes nothing, 2 doubles it."""

    def neuron_set(self) -> tuple[tuple[str, ...], str]:
        """Return the field `neurons` and its value."""
        return ("neurons",), self.neurons

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digest of the set."""
        return [context.neurons(self.neurons)]
