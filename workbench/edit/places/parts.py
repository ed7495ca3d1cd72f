"""Decoder layers and feed-forward output projections of a live model, which edits write to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.adapters.places import Places
from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.models.architecture import is_conv1d
from workbench.models.layout import stack_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.steps import MethodContext

_ATTENTION = re.compile(r"att(n|ention)")
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
        assert isinstance(layers, nn.ModuleList)
        places = _feed_forward_mixers(layers)
        if not places:
            _refuse(model, layers)
            places = list(range(len(layers)))
        ran = _order(model, layers, context.device)
        width = (
            int(model.get_input_embeddings().weight.shape[1])
            if not hasattr(model.config, "hidden_size")
            else int(model.config.hidden_size)
        )
        names = {id(m): name for name, m in model.named_modules()}
        modules: dict[int, str] = {}
        for number in places:
            projections = [
                m for m in ran[number] if _rows(m) == width and not _ATTENTION.search(names[id(m)].removeprefix(f"{prefix}."))
            ]
            if not projections:
                raise WorkbenchError(
                    f"layer {number} of {type(model).__name__} has no linear module outside the attention with {width} outputs",
                    f"Edits change the feed-forward output projection. {INSTEAD}",
                )
            modules[number] = names[id(projections[-1])]
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
        found: nn.Module = self.model.get_submodule(self.modules[layer])
        return found

    def width(self, layer: int) -> int:
        """Return the number of inputs of a layer's output projection, which is the length of a key."""
        weight = self.out(layer).weight
        assert isinstance(weight, Tensor)
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
                assert isinstance(weight, nn.Parameter)
                saved[layer] = weight.data
                added = update.T if self.transposed else update
                weight.data = weight.data + added.to(weight.device, weight.dtype)
            yield
        finally:
            for layer, data in saved.items():
                self.out(layer).weight.data = data


class Stopped(Exception):  # noqa: N818  not an error: the rest of the forward pass is skipped
    """Exception that a hook raises to end a forward pass early."""


@contextmanager
def hooked(
    module: nn.Module, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Register a forward pre-hook, a forward hook, or both, within the block."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(before))
    if after is not None:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shaped(flat: Tensor, batch: int, time: int) -> Tensor:
    """Reshape the input or output of a linear layer to [batch, time, width]; OPT flattens the first two dimensions."""
    return flat.reshape(batch, time, flat.shape[-1])


def first_of(output: Any) -> Tensor:
    """Return the hidden state from a block's output, which is a tuple in some architectures."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_first(output: Any, hidden: Tensor) -> Any:
    """Return a block's output with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _feed_forward_mixers(layers: nn.ModuleList) -> list[int]:
    """Find the feed-forward layers of a model whose layers are one mixer each (Nemotron-H).

    Each layer of such a model is an attention, a state-space model, a set of experts or a feed-forward part. Only feed-forward
    parts can be edited. Returns an empty list for models of other kinds.
    """
    mixers = [getattr(layer, "mixer", None) for layer in layers]
    if any(mixer is None for mixer in mixers) or not any(hasattr(mixer, "q_proj") for mixer in mixers):
        return []
    return [number for number, mixer in enumerate(mixers) if isinstance(getattr(mixer, "down_proj", None), nn.Linear)]


def _refuse(model: PreTrainedModel, layers: nn.ModuleList) -> None:
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
        attention = any(_ATTENTION.search(n) for n, _ in layer.named_children()) or any(
            _ATTENTION.search(n) for n, _ in layer.named_modules()
        )
        if any(n.endswith("A_log") for n in names) or not attention:
            raise WorkbenchError(
                f"layer {number} of {kind} is a state-space or recurrent layer: edits of weights need attention and a feed-forward part",
                INSTEAD,
            )


def _order(model: PreTrainedModel, layers: nn.ModuleList, device: torch.device) -> list[list[nn.Module]]:
    """Return the linear modules of every block in the order in which a one-token forward pass runs them."""
    ran: list[list[nn.Module]] = [[] for _ in layers]
    handles = []
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if _rows(module) is not None:
                handles.append(module.register_forward_hook(lambda m, _args, _out, number=number: ran[number].append(m)))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _rows(module: nn.Module) -> int | None:
    """Return the number of outputs of a linear module; None for other modules."""
    if isinstance(module, nn.Linear):
        return int(module.weight.shape[0])
    weight = getattr(module, "weight", None)
    return int(weight.shape[1]) if is_conv1d(module) and isinstance(weight, Tensor) else None
