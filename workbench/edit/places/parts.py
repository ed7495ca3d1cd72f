"""Decoder layers and feed-forward output projections of a live model, which edits write to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.adapters.lora import Places
from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.lazy import torch
from workbench.models.architecture import is_conv1d
from workbench.models.hooks import feed_forward_mixers, hidden_width, is_attention, output_projections
from workbench.models.layout import stack_prefix

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from workbench.steps import MethodContext

INSTEAD = "Use `edit: memory`, which stores facts outside the weights and works with every architecture."


@dataclass(frozen=True)
class Parts:
    """Parts of a live decoder-only model that edits use.

    Attributes:
        model: The live model.
        layers: Its decoder layers.
        prefix: Live name of the layers: "model.layers".
        modules: Layer -> live name of the feed-forward output projection. In Nemotron-H only some layers have one.
        tensors: Layer -> name on disk of that projection's weight.
        transposed: Whether those weights are stored as [in, out] (Conv1D).
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str
    modules: Mapping[int, str]
    tensors: Mapping[int, str]
    transposed: bool

    @classmethod
    def of(cls, context: MethodContext) -> Parts:
        """Find the parts of a context's model.

        The output projection of a layer is the last linear module outside the attention that a one-token forward pass runs and
        whose output is as wide as the hidden state.

        Raises:
            WorkbenchError: If the model has experts, state-space layers, or a layer without such a projection.
        """
        model = context.model
        prefix = stack_prefix(model, context.layout.layout.depth)
        layers = model.get_submodule(prefix)
        assert isinstance(layers, torch.nn.ModuleList)
        places = feed_forward_mixers(layers)
        if not places:
            _refuse_unsupported(model, layers)
            places = list(range(len(layers)))
        modules = output_projections(model, prefix, places, context.device)
        if missing := [number for number in places if number not in modules]:
            raise WorkbenchError(
                f"layer {missing[0]} of {type(model).__name__} has no linear module outside the attention with {hidden_width(model)} outputs",
                f"Edits change the feed-forward output projection. {INSTEAD}",
            )
        on_disk = Places(context.layout.weights.specs, context.layout.config)
        tensors: dict[int, str] = {}
        for number, module in modules.items():
            name = on_disk.whole(f"{module}.weight")
            if name is None:
                raise WorkbenchError(
                    f"{module}.weight: edits do not support a weight that transformers fuses or renames", INSTEAD
                )
            tensors[number] = name
        first = model.get_submodule(modules[places[0]])
        return cls(model, layers, prefix, modules, tensors, is_conv1d(first))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def editable(self) -> list[int]:
        """Layers with a feed-forward output projection: all of them, except in models whose layers are one mixer each."""
        return sorted(self.modules)

    def nearest(self, layer: int) -> int:
        """Return the editable layer that is nearest to a layer; of two, the earlier one."""
        return min(self.editable, key=lambda other: (abs(other - layer), other))

    def out(self, layer: int) -> nn.Module:
        """Return a layer's feed-forward output projection."""
        module: nn.Module = self.model.get_submodule(self.modules[layer])
        return module

    def width(self, layer: int) -> int:
        """Return the number of inputs of a layer's output projection, which is the length of a key."""
        weight = self.out(layer).weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0] if self.transposed else weight.shape[1])

    def check_layers(self, layers: tuple[int, ...], label: str) -> None:
        """Check that layers exist and can be edited.

        Args:
            layers: Layer indices.
            label: Start of the error message, such as "edit memit".

        Raises:
            WorkbenchError: If a layer does not exist or has no feed-forward part.
        """
        if bad := [i for i in layers if not 0 <= i < self.depth]:
            raise InvalidRecipeError(f"{label}: layer {bad[0]} does not exist; the model has layers 0 to {self.depth - 1}")
        if bad := [i for i in layers if i not in self.modules]:
            raise InvalidRecipeError(
                f"{label}: layer {bad[0]} has no feed-forward part to edit",
                f"Choose from the layers that have one: {', '.join(map(str, self.editable))}.",
            )

    @contextmanager
    def changed(self, updates: dict[int, Tensor]) -> Iterator[None]:
        """Add updates ΔW [out, in] to output projections within the block; the model's own weights are restored after it."""
        saved: dict[int, Tensor] = {}
        try:
            for layer, update in updates.items():
                weight = self.out(layer).weight
                assert isinstance(weight, torch.nn.Parameter)
                saved[layer] = weight.data
                added = update.T if self.transposed else update
                weight.data = weight.data + added.to(weight.device, weight.dtype)
            yield
        finally:
            for layer, data in saved.items():
                self.out(layer).weight.data = data


def _refuse_unsupported(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Raise WorkbenchError if a layer has experts, or is not an attention with a feed-forward part."""
    kind = type(model).__name__
    for number, layer in enumerate(layers):
        names = dict(layer.named_parameters())
        if any(p.dim() == 3 and "conv" not in n for n, p in names.items()) or any(
            n.endswith("experts") for n, _ in layer.named_modules()
        ):
            raise WorkbenchError(
                f"layer {number} of {kind} routes tokens to experts: edits of weights need one feed-forward part per layer",
                INSTEAD,
            )
        attention = any(is_attention(n) for n, _ in layer.named_children()) or any(
            is_attention(n) for n, _ in layer.named_modules()
        )
        if any(n.endswith("A_log") for n in names) or not attention:
            raise WorkbenchError(
                f"layer {number} of {kind} is a state-space or recurrent layer: edits of weights need attention and a feed-forward part",
                INSTEAD,
            )
