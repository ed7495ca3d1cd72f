"""Steer: add a direction to the state after some layers, measured on two lists of contrasting prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from workbench.adapters.lora import Places
from workbench.edit.places.parts import Parts
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import first_of, hooked
from workbench.models.layout import Model
from workbench.models.prompts import encode_text
from workbench.models.texts import read_prompts
from workbench.steps import KeyContext, MethodContext, Step, register
from workbench.steps.fields import Real, Whole

if TYPE_CHECKING:
    from torch import Tensor

_NO_BIAS = "In a llama model, `- {grow: bias}` before this step adds biases of zero, which change nothing."
_TOLERANCE = 1e-3  # largest error of the measured shift, as a share of the direction's largest element


@register
class Steer(Step):
    """Add a direction to the state after some layers, at every position (Rimsky et al. 2024, contrastive activation addition).

    The direction is the difference of two means: of the layer's outputs at the last token of the positive prompts, and of the
    negative ones. It becomes a bias of the layer's feed-forward output projection, so that the result is an ordinary checkpoint. The
    base must have this bias; `grow: bias` adds one to llama models. The step teaches no facts.
    """

    paper: ClassVar[str] = (
        "Rimsky et al. 2024, Steering Llama 2 via contrastive activation addition, arXiv 2312.06681; Turner et al. 2023, arXiv 2308.10248"
    )
    formula: ClassVar[str] = (
        "b_ℓ ↦ b_ℓ + c · v_ℓ,  v_ℓ = mean over positive of h_ℓ(last token) − mean over negative of h_ℓ(last token)"
    )
    kind = "steer"
    verb = "edit"

    edit: Literal["steer"]
    positive: str
    """JSONL file of `{"prompt"}` or `{"text"}`, relative to the project: prompts that show what the model should do."""
    negative: str
    """JSONL file of prompts that show the opposite."""
    layers: tuple[Whole, ...] = Field(min_length=1)
    """Layers after which the direction is added, from 0. Each layer has its own direction, measured on the model before the step."""
    strength: Real = Field(1.0, allow_inf_nan=False)
    """Factor c of the directions: 0 changes nothing, a negative value steers the other way."""

    def inputs(self) -> list[str]:
        """Return the two files of prompts."""
        return [self.positive, self.negative]

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of the prompts and of the tokenizer."""
        return [context.files(self.inputs()), [context.tokens(context.number)]]

    def check_inputs(self, project: Path) -> None:
        """Read the prompts.

        Raises:
            WorkbenchError: If a file has no prompts, or both have the same ones.
        """
        positive, negative = (read_prompts(project / file, file, least=1) for file in self.inputs())
        if sorted(positive) == sorted(negative):
            raise InvalidRecipeError(
                f"edit steer: {self.positive} and {self.negative} have the same prompts, so that there is no direction between them",
                "Write prompts that differ in what the direction should mean.",
            )
        if twice := [layer for layer in dict.fromkeys(self.layers) if self.layers.count(layer) > 1]:
            raise InvalidRecipeError(f"edit steer: layer {twice[0]} is listed twice in `layers`", "List each layer once.")

    def check_model(self, model: Model) -> None:
        """Check from names that the layers exist, and that they have the bias that a strength other than 0 changes.

        Args:
            model: Names, shapes and configuration before the step.

        Raises:
            WorkbenchError: If a layer does not exist or has no bias.
        """
        layout = model.layout
        for layer in self.layers:
            if not 0 <= layer < layout.depth:
                raise InvalidRecipeError(
                    f"edit steer: layer {layer} does not exist; the model has layers 0 to {layout.depth - 1}"
                )
            weight = layout.mlp_out(layer) if self.strength else ""
            if weight and f"{weight.removesuffix('weight')}bias" not in model.weights.specs:
                raise _no_bias(weight.removesuffix(".weight"), model)

    def solve(self, context: MethodContext) -> Steering:
        """Measure the directions on the live current model.

        Raises:
            WorkbenchError: If a layer has no bias, gives both lists the same states, or its output does not move by what is added to
                the bias.
        """
        parts = Parts.find(context)
        parts.check_layers(self.layers, "edit steer")
        on_disk = Places(context.layout.weights.specs, context.layout.config)
        names = {layer: on_disk.whole(f"{parts.modules[layer]}.bias") for layer in self.layers}
        for layer, name in names.items():
            if name is None or getattr(parts.out(layer), "bias", None) is None:
                raise _no_bias(parts.modules[layer], context.layout)
        biases = {layer: name for layer, name in names.items() if name is not None}
        means = []
        for file in self.inputs():
            rows = [list(encode_text(context.tokenizer, text)) for text in read_prompts(context.project / file, file)]
            if empty := [i for i, row in enumerate(rows) if not row]:
                raise WorkbenchError(
                    f"{file}: prompt {empty[0] + 1} has no tokens in the base's vocabulary", "Rephrase the prompt."
                )
            means.append(_mean_states(parts, rows, self.layers, context, file))
        shifts: dict[int, Tensor] = {}
        norms: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            direction = means[0][layer] - means[1][layer]
            if not direction.abs().max() > 0:
                raise WorkbenchError(
                    f"edit steer: layer {layer} has the same mean state for both lists of prompts",
                    "The last tokens decide: end the prompts in words that differ, or choose a later layer.",
                )
            shifts[layer] = self.strength * direction
            norms[str(layer)] = {"direction": float(direction.norm()), "state": float(means[1][layer].norm())}
            _check_shift(parts, layer, shifts[layer], rows[0], context)
        modules = {layer: parts.modules[layer] for layer in self.layers}
        widths = {layer: parts.width(layer) for layer in self.layers}
        return Steering(shifts, modules, biases, widths, parts.transposed, {"strength": self.strength, "norms": norms})


@dataclass(frozen=True)
class Steering:
    """Directions that are added after layers.

    Attributes:
        shifts: Layer -> c · v [hidden size], float32, on the CPU.
        modules: Layer -> live name of its feed-forward output projection.
        biases: Layer -> name on disk of that projection's bias.
        widths: Layer -> number of inputs of that projection.
        transposed: Whether its weight is stored as [in, out] (Conv1D).
        record: Measurements, as plain data.
    """

    shifts: dict[int, Tensor]
    modules: dict[int, str]
    biases: dict[int, str]
    widths: dict[int, int]
    transposed: bool
    record: dict[str, object]


def _no_bias(module: str, model: Model) -> WorkbenchError:
    """Return the error for an output projection without a bias."""
    return WorkbenchError(
        f"edit steer: {module} has no bias in this {model.config.get('model_type')} model, and the direction is stored as that bias",
        _NO_BIAS,
    )


def _mean_states(
    parts: Parts, rows: Sequence[list[int]], layers: Sequence[int], context: MethodContext, file: str
) -> dict[int, Tensor]:
    """Return layer -> mean over prompts of its output at the last token [hidden size], summed in float64."""
    sums: dict[int, Tensor] = {}
    for done, row in enumerate(rows, 1):
        for layer, states in _states(parts, row, layers, context).items():
            sums[layer] = sums.get(layer, 0) + states[-1].double()
        context.progress(done, len(rows), f"states of {file}")
    return {layer: (total / len(rows)).float() for layer, total in sums.items()}


@no_grad
def _states(parts: Parts, row: list[int], layers: Sequence[int], context: MethodContext) -> dict[int, Tensor]:
    """Return layer -> its outputs for one text [time, hidden size], on the CPU."""
    states: dict[int, Tensor] = {}

    def record(layer: int, _module: Any, _inputs: Any, output: Any) -> None:
        states[layer] = first_of(output)[0].float().cpu()

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(parts.layers[layer], after=partial(record, layer)))
        parts.model(input_ids=torch.tensor([row], device=context.device), use_cache=False)
    return states


def _check_shift(parts: Parts, layer: int, shift: Tensor, row: list[int], context: MethodContext) -> None:
    """Check that the layer's output moves by what is added to the bias. Raises WorkbenchError if it does not."""
    bias = parts.out(layer).bias
    assert isinstance(bias, torch.nn.Parameter)
    before, saved = _states(parts, row, [layer], context)[layer], bias.data
    try:
        bias.data = saved + shift.to(saved.device)
        after = _states(parts, row, [layer], context)[layer]
    finally:
        bias.data = saved
    error = float((after - before - shift).abs().max())
    if not error <= _TOLERANCE * float(shift.abs().max()) + 1e-5 * float(before.abs().max()):
        raise WorkbenchError(
            f"edit steer: in this {context.layout.config.get('model_type')} model, the state after layer {layer} does not move by what "
            f"is added to its bias (largest error {error:.2g}), such as where a norm follows the feed-forward part",
            "Choose a base whose feed-forward output is added to the state unchanged, such as gpt2 or llama.",
        )
