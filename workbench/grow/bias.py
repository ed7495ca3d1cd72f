"""Bias: biases of zero on the feed-forward projections, which later steps and bricks can change."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.lazy import np
from workbench.models.layout import Model
from workbench.steps import NEW, Axis, GrowMethod, Grown, Growth, Learns, Preserves, register

_PROJECTION = re.compile(r"\.mlp\.(gate|up|down)_proj\.weight$")


@register
class Bias(GrowMethod):
    """Add biases of zero to the feed-forward projections of a llama model, which transformers reads with `mlp_bias: true`.

    The grown model computes the same function. `edit: steer` and adapters with `lora_bias` need such a bias on the output projection.
    """

    formula = "W x ↦ W x + b with b = 0, for W_gate, W_up and W_down of every layer"
    preserves: ClassVar[Preserves] = "exact"
    learns: ClassVar[Learns] = "now"

    grow: Literal["bias"]

    def expand(self, model: Model) -> Growth:
        """Plan the grown model: each projection's weight is followed by a bias of zeros.

        Raises:
            WorkbenchError: If the model is no llama model, or has these biases.
        """
        family = model.config.get("model_type")
        if family != "llama":
            raise InvalidRecipeError(
                f"grow bias: the base is a {family} model, whose class in transformers reads no `mlp_bias`",
                "Only llama models can get these biases; gpt2 and some others have them already.",
            )
        specs = model.weights.specs
        if model.config.get("mlp_bias"):
            raise InvalidRecipeError("grow bias: the base has these biases already (`mlp_bias: true`)", "Remove the step.")
        tensors: dict[str, Grown] = {}
        for name, spec in specs.items():
            tensors[name] = Grown(name)
            if _PROJECTION.search(name):
                # The vector of a norm gives the dtype; its elements are not read.
                norm = re.sub(_PROJECTION, ".post_attention_layernorm.weight", name)
                bias = name.removesuffix("weight") + "bias"
                tensors[bias] = Grown(norm, new=True, zero=True, rows=Axis(np.full(spec.rows, NEW)))
        added = len(tensors) - len(specs)
        return Growth(tensors, {**model.config, "mlp_bias": True}, {"biases": added})
