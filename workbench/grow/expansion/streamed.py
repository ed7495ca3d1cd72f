"""Logits of a model whose weights stay on disk: memory holds the embeddings, and one decoder layer or the head at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.layout import Model, Piece, in_decoder, live_layout
from workbench.weights.specs import Weights, load

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class NotStreamedError(RuntimeError):
    """Raised when a model reads weights outside of their module, so that it cannot run without all of them in memory."""


@dataclass(frozen=True)
class Streamed:
    """A model without weights, and the places of its tensors on disk.

    Attributes:
        model: The model, with parameters on the meta device and buffers computed by transformers.
        weights: The tensors on disk.
        pieces: Live tensor -> the parts on disk that fill it, also for tied names.
        device: Device to which tensors are loaded.
    """

    model: PreTrainedModel
    weights: Weights
    pieces: Mapping[str, tuple[Piece, ...]]
    device: torch.device

    @classmethod
    def prepare(cls, model: Model, built: PreTrainedModel, device: torch.device) -> Streamed | None:
        """Return the streamed model, or None if transformers computes a tensor from the files instead of copying it."""
        layout = live_layout(model.weights.specs, model.config)
        if layout is None:
            return None
        pieces = dict(layout.pieces)
        tied: dict[int, tuple[Piece, ...]] = {}
        names = [(n, p) for n, p in built.named_parameters(remove_duplicate=False)]
        for name, parameter in names:
            if name in pieces:
                tied.setdefault(id(parameter), pieces[name])
        for name, parameter in names:
            if name not in pieces:
                if id(parameter) not in tied:
                    return None
                pieces[name] = tied[id(parameter)]
        return cls(built, model.weights, pieces, device)

    @no_grad
    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [rows, tokens, vocabulary] in float32.

        Raises:
            NotStreamedError: If the model reads weights that are not loaded.
        """
        model = self.model
        layers = decoder_layers(model)
        lazy = [(f"{layers[0]}.{i}", layer) for i, layer in enumerate(layers[1])] if layers else []
        head = model.get_output_embeddings()
        lazy += [(name, module) for name, module in model.named_modules() if module is head and module is not None]
        outside_layers = [n for n in self._tensors("", model) if not any(n.startswith(f"{name}.") for name, _ in lazy)]
        with ExitStack() as stack:
            stack.enter_context(self._loaded(outside_layers))
            for name, module in lazy:
                stack.enter_context(self._loaded_when_called(name, module))
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
        return logits

    def _tensors(self, prefix: str, module: nn.Module) -> list[str]:
        """Return the live names of a module's parameters and buffers that are on disk."""
        start = f"{prefix}." if prefix else ""
        names = [n for n, _ in module.named_parameters(remove_duplicate=False)] + [n for n, _ in module.named_buffers()]
        return [start + n for n in names if start + n in self.pieces]

    @contextmanager
    def _loaded(self, names: list[str]) -> Iterator[None]:
        """Hold tensors in memory inside the block."""
        places: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name in names:
                parent, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(parent)
                registry: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
                places.append((registry, leaf, registry[leaf]))
                tensor = self._tensor(self.pieces[name], tuple(registry[leaf].shape))
                registry[leaf] = torch.nn.Parameter(tensor, requires_grad=False) if registry is module._parameters else tensor
            yield
        finally:
            for registry, leaf, previous in reversed(places):
                registry[leaf] = previous

    @contextmanager
    def _loaded_when_called(self, name: str, module: nn.Module) -> Iterator[None]:
        """Load a module's tensors before its forward, and free them after it."""
        names = self._tensors(name, module)
        loaded = ExitStack()

        def load_tensors(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> None:
            if any(
                isinstance(argument, torch.Tensor) and argument.device.type == "meta" for argument in (*args, *kwargs.values())
            ):
                raise NotStreamedError(f"an argument of {name} is on the meta device")
            loaded.enter_context(self._loaded(names))

        with (
            loaded,
            module.register_forward_pre_hook(load_tensors, with_kwargs=True),
            module.register_forward_hook(lambda *_: loaded.close(), always_call=True),
        ):
            yield

    def _tensor(self, pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> Tensor:
        """Return a live tensor in float32 (integers keep their dtype), filled from its pieces."""
        out: Tensor | None = None
        for piece in pieces:
            spec = self.weights.specs[piece.disk]
            disk_tensor = load(self.weights, piece.disk, torch.float32, self.device)
            extent = list(spec.shape)
            for axis, size in zip(piece.axes, piece.size, strict=True):
                if axis is not None:
                    extent[axis] = size
            box = disk_tensor[tuple(slice(a, a + n) for a, n in zip(piece.disk_start, extent, strict=True))]
            part = box.permute([axis for axis in piece.axes if axis is not None]).reshape(piece.size)
            if len(pieces) == 1 and tuple(part.shape) == shape:
                return part.contiguous()
            out = torch.zeros(shape, dtype=part.dtype, device=self.device) if out is None else out
            out[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))] = part
        assert out is not None, "a live tensor has at least one piece"
        return out


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the live name and the list of decoder layers (the longest module list nearest to the root of the text decoder), or None."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    inside = in_decoder(model)
    return min(lists, key=lambda entry: (not inside(entry[0]), entry[0].count("."), -len(entry[1])), default=None)


def streamed_bytes(model: Model) -> int:
    """Return an estimate of the memory of `Streamed.logits` in bytes.

    It counts the embeddings and other tensors outside the layers, the largest layer or the head, and one tensor while it is read.
    If the model has no layers, it counts the whole model.
    """
    sizes = {name: spec.numel for name, spec in model.weights.specs.items()}
    try:
        layout = model.layout
    except WorkbenchError:
        return 8 * sum(sizes.values())
    layers = [0] * layout.depth
    outside_layers = []
    for name, size in sizes.items():
        number = layout.layer(name)
        if number is None:
            outside_layers.append(size)
        else:
            layers[number] += size
    outside_layers.sort()
    head = (
        outside_layers[-2] if len(outside_layers) > 1 and outside_layers[-2] == outside_layers[-1] else 0
    )  # an untied head is as large as the embeddings
    return 4 * (sum(outside_layers) - head + max([*layers, head]) + max(sizes.values()))
