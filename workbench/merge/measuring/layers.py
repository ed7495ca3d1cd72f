"""Run a model over all texts one decoder layer at a time, so that only one layer is in memory.

First, recorders replace the layers. They keep the arguments that the model passes to each layer for every batch (masks, rotary
positions) and the hidden states that enter the first layer. Then each layer is loaded, run over all batches and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.models.architecture import counterpart, is_conv1d, is_head
from workbench.models.layout import stack_prefix
from workbench.models.texts import Batch
from workbench.steps import MergeContext
from workbench.weights.specs import load

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments that a model passes to a layer, without the hidden states."""


@dataclass
class LayerStack:
    """A causal model whose parameters are loaded and freed layer by layer.

    Attributes:
        model: The model, with its parameters on the meta device, or fully loaded if `tensor` is None.
        layers: The decoder layers.
        prefix: Live name of the layers: "model.layers".
        disk: Live parameter name -> tensor name.
        outside_layers: Live names of the parameters outside the layers, an untied head excluded.
        head: Tensor name of an untied head.
        tensor: Function that loads a tensor by name; None if the whole model is loaded.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str
    disk: dict[str, str]
    outside_layers: list[str]
    head: str | None
    tensor: Callable[[str], Tensor] | None
    _calls: list[list[Call]] = field(default_factory=list)
    _entering: list[Tensor] = field(default_factory=list)
    _tuples: bool | None = None

    @classmethod
    def of(cls, context: MergeContext, brick: str) -> LayerStack:
        """Return a brick's model, ready to run layer by layer.

        If every parameter has its own tensor on disk, the model is streamed. If transformers fuses weights (experts), the whole
        model is loaded instead.

        Raises:
            WorkbenchError: If the model has no stack of decoder layers.
        """
        weights, model = context.weights(brick), context.skeleton()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        disk = {live: name for name in weights.specs if (live := counterpart(name, parameters))}
        output = getattr(model.get_output_embeddings(), "weight", None)
        live_head = next((name for name, p in parameters.items() if p is output), None)
        if live_head is None or output is model.get_input_embeddings().weight:
            live_head = None
            head = None
        else:  # gpt_neox's embed_out is called lm_head in the live model
            head = disk.get(live_head) or next(filter(is_head, weights.specs), None)
        prefix = stack_prefix(model, context.base.layout.depth)
        names = [name for name, _ in model.named_parameters() if name != live_head]
        outside_layers = [name for name in names if not name.startswith(f"{prefix}.")]
        tensor: Callable[[str], Tensor] | None = partial(load, weights, dtype=torch.float32, device=context.device)
        if any(name not in disk for name in names):
            model, tensor = context.live(brick), None
        layers = model.get_submodule(prefix)
        assert isinstance(layers, torch.nn.ModuleList)
        return cls(model, layers, prefix, disk, outside_layers, head, tensor)

    @contextmanager
    def loaded(self, layer: int | None = None) -> Iterator[None]:
        """Load the parameters of a layer, or with None those outside the layers, for the duration of the block."""
        names = (
            self.outside_layers
            if layer is None
            else [f"{self.prefix}.{layer}.{n}" for n, _ in self.layers[layer].named_parameters()]
        )
        if self.tensor is None:
            yield
            return
        places = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in names]
        absent = {name: module._parameters[leaf] for module, leaf, name in places}
        try:
            for module, leaf, name in places:
                module._parameters[leaf] = torch.nn.Parameter(self.tensor(self.disk[name]), requires_grad=False)
            yield
        finally:
            for module, leaf, name in places:
                module._parameters[leaf] = absent[name]

    def readers(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear layers inside a decoder layer, by the tensor name of their weight."""
        inner = self.layers[layer].named_modules(prefix=f"{self.prefix}.{layer}")
        linear = {name: m for name, m in inner if isinstance(m, torch.nn.Linear) or is_conv1d(m)}
        return {self.disk[f"{name}.weight"]: m for name, m in linear.items() if f"{name}.weight" in self.disk}

    def enter(self, data: Iterable[Batch]) -> tuple[list[Tensor], list[list[Call]]]:
        """Run the model up to its layers, and record what it passes to them.

        Returns:
            The hidden states that enter the first layer, one tensor per batch; and the other arguments of each layer,
            [batch][layer].

        Raises:
            WorkbenchError: If a forward pass does not call every decoder layer once.
        """
        self._entering, self._calls = [], []
        with self.loaded(), self._replaced(self._record):
            for batch in data:
                self._calls.append([])
                self._forward(batch)
                if len(self._calls[-1]) != len(self.layers):
                    raise WorkbenchError(
                        f"a forward pass made {len(self._calls[-1])} layer calls, expected one per layer ({len(self.layers)})",
                        "This architecture does not run its layers in sequence: use a method without calibration texts.",
                    )
        return self._entering, self._calls

    def run(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """Return the output of one layer."""
        output = self.layers[layer](hidden, *call[0], **call[1])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def leave(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the input of the head, given the output of the last layer."""
        with self._replaced(lambda _layer, *_args, **_kwargs: self._shaped(hidden)):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        """Run the decoder without its head, and return the last hidden states."""
        inner = getattr(self.model, self.model.base_model_prefix, self.model)
        result: Tensor = inner(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)[0]
        return result

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace the forward of every layer by a function whose first argument is the layer's index; other attributes stay."""
        try:
            for i, layer in enumerate(self.layers):
                layer.forward = partial(forward, i)
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _record(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Record a layer's inputs in place of running it."""
        hidden, other_args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._tuples is None:
            with self.loaded(0):
                self._tuples = isinstance(type(self.layers[0]).forward(self.layers[0], hidden, *other_args, **kwargs), tuple)
        if layer == 0:
            self._entering.append(hidden)
        self._calls[-1].append((other_args, kwargs))
        return self._shaped(hidden)

    def _shaped(self, hidden: Tensor) -> Any:
        """Return hidden states in the form of this architecture's layer output: some layers return a tuple."""
        return (hidden, None, None) if self._tuples else hidden
