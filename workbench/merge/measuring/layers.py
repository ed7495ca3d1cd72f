"""Models that run over all texts one decoder layer at a time, so that only one layer is in memory, and statistics of layers' inputs.

First, recorders replace the layers. They keep the arguments that the model passes to each layer for every batch (masks, rotary
positions) and the hidden states that enter the first layer. Then each layer is loaded, run over all batches and freed.

A Gram matrix is the second moment of a linear layer's inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from safetensors import safe_open

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import scratch_beside, write_json
from workbench.ground.lazy import torch
from workbench.ground.manifest import publish_sealed, reusable
from workbench.ground.results import JsonObject, Result
from workbench.models.architecture import counterpart, is_conv1d, is_head
from workbench.models.hooks import hooked
from workbench.models.layout import stack_prefix
from workbench.models.texts import Batch, TextRow, batches
from workbench.steps import MergeContext
from workbench.weights.header import save_tensors
from workbench.weights.specs import load

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

INDEX = "index.json"
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
    def for_brick(cls, context: MergeContext, brick: str) -> LayerStack:
        """Return a brick's model, ready to run layer by layer.

        If every parameter has its own tensor on disk, the model is streamed. If transformers fuses weights (experts), the whole
        model is loaded instead.
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


def without_padding(inputs: Tensor, batch: Batch) -> Tensor:
    """Return the inputs of a linear layer at the counted tokens, [token, in] in float32."""
    return inputs.reshape(-1, inputs.shape[-1])[batch.counted.flatten()].float()


@contextmanager
def inputs_read(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the last input of some linear layers, by the tensor name of their weight."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0]

    with ExitStack() as stack:
        for name, module in readers.items():
            stack.enter_context(hooked(module, before=partial(keep, name)))
        yield found


def shared(inputs: Mapping[str, Tensor], batch: Batch) -> dict[str, list[str]]:
    """Return the readers of each distinct input that has one row per token: first reader -> all readers."""
    seen: list[tuple[Tensor, list[str]]] = []
    for name, tensor in inputs.items():
        readers = next((readers for known, readers in seen if known is tensor), None)
        if readers is not None:
            readers.append(name)
        elif tensor.numel() == batch.mask.numel() * tensor.shape[-1]:
            seen.append((tensor, [name]))
    return {readers[0]: readers for _, readers in seen}


class TextsRead(JsonObject):
    """How a model read texts."""

    tokens: int
    """Number of tokens."""
    streamed: bool
    """True if one layer was in memory at a time."""


@dataclass(frozen=True)
class InputWalk:
    """A pass of a brick's model over texts, one decoder layer at a time, that sums up a statistic of every linear layer's inputs.

    Attributes:
        context: Source of the model.
        brick: Name of the brick; "" is the base.
        rows: The texts.
        statistic: Function from the inputs of some tokens, parts of [token, in], to what is summed up.
        add: Function that adds a later part of the statistic to an earlier one.
    """

    context: MergeContext
    brick: str
    rows: Sequence[TextRow]
    statistic: Callable[[Sequence[Tensor]], Tensor]
    add: Callable[[Tensor, Tensor], Tensor] = operator.iadd

    @cached_property
    def _data(self) -> list[Batch]:
        return list(batches(self.rows, self.context.device))

    @cached_property
    def _stack(self) -> LayerStack:
        return LayerStack.for_brick(self.context, self.brick)

    @property
    def who(self) -> str:
        """The model, in messages."""
        return f"brick '{self.brick}'" if self.brick else "base"

    @cached_property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(int(batch.counted.sum()) for batch in self._data)

    @property
    def record(self) -> TextsRead:
        """How the texts were read."""
        return TextsRead(tokens=self.tokens, streamed=self._stack.tensor is not None)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield each distinct input's statistic over all tokens, with the tensor names of the linear layers that read the input."""
        stack, depth = self._stack, len(self._stack.layers)
        hidden, calls = stack.enter(self._data)
        for layer in range(depth):
            self.context.progress(layer, depth, f"{self.who}: inputs of layer {layer}")
            sums: dict[str, tuple[Tensor, list[str]]] = {}
            with stack.loaded(layer), inputs_read(stack.readers(layer)) as read:
                for i, batch in enumerate(self._data):
                    read.clear()
                    hidden[i] = stack.run(layer, hidden[i], calls[i][layer])
                    for first, readers in shared(read, batch).items():
                        part = self.statistic([without_padding(read[first], batch)])
                        sums[first] = (self.add(sums[first][0], part) if first in sums else part), readers
            yield from sums.values()
        if stack.head is not None:
            with stack.loaded():
                states = [stack.leave(batch, h)[batch.counted] for batch, h in zip(self._data, hidden, strict=True)]
            yield self.statistic(states), [stack.head]
        self.context.progress(depth, depth, f"{self.who}: inputs")


@dataclass(frozen=True)
class Grams:
    """One brick's Gram matrices in the cache: one file per distinct input, shared by the linear layers that read that input.

    Attributes:
        folder: Directory of the files.
        files: Tensor name of a linear layer's weight -> file name.
        record: How the texts were read.
    """

    folder: Path
    files: Mapping[str, str]
    record: TextsRead

    def gram(self, tensor: str, device: torch.device, off_diagonal: float = 1.0) -> Tensor:
        """Return the mean of x xᵀ over all tokens [in, in] in float32, with its off-diagonal elements scaled by a factor."""
        with safe_open(self.folder / self.files[tensor], "pt") as file:
            full = _unpack(file.get_tensor("gram")).to(device)
        diagonal = full.diagonal().clone()
        full.mul_(off_diagonal).diagonal().copy_(diagonal)
        return full


class InputIndex(Result):
    """Index of what was measured of one brick's inputs in the cache."""

    files: dict[str, str]
    """Tensor name of a linear layer's weight -> file name."""
    record: TextsRead
    """How the texts were read."""


def collect(context: MergeContext, brick: str, rows: Sequence[TextRow], key: str) -> Grams:
    """Return one brick's Grams from the cache, or collect them and cache them.

    Memory holds one layer of the brick's model, the hidden states of all rows and the Grams of one layer; before and after the
    layers, it holds the embeddings.
    """
    place = context.cache / "grams" / key
    walk = InputWalk(context, brick, rows, _sum_of_squares)
    index = in_cache(place, lambda out: write_inputs(walk, out, "gram", _pack), InputIndex)
    return Grams(place, index.files, index.record)


Index = TypeVar("Index", bound=Result)


def in_cache(place: Path, measure: Callable[[Path], Index], kind: type[Index]) -> Index:
    """Return the index of a directory in the cache, which is measured first if it is missing or damaged.

    Args:
        place: The directory.
        measure: Function that writes the content into an empty directory and returns its index; it runs without gradients.
        kind: Class of the index.
    """
    if reusable(place, INDEX):
        with suppress(OSError, WorkbenchError):
            return kind.read(place / INDEX)
    with scratch_beside(place) as name, torch.no_grad():
        made = name / "made"
        made.mkdir()
        index = measure(made)
        write_json(made / INDEX, index.to_dict())
        publish_sealed(made, place)
    return index


def write_inputs(walk: InputWalk, out: Path, name: str, stored: Callable[[Tensor, int], Tensor]) -> InputIndex:
    """Measure a brick's inputs layer by layer, and write each distinct one to a file of a directory; return the index.

    Args:
        walk: The measurement.
        out: The directory.
        name: Name of the tensor in each file.
        stored: Function from a statistic over all tokens, and their number, to what is written.
    """
    files: dict[str, str] = {}
    for value, readers in walk:
        if not bool(torch.isfinite(value).all()):
            raise WorkbenchError(
                f"{walk.who}: the inputs of {readers[0]} on the calibration texts are NaN or infinite",
                "Train or fetch the brick again.",
            )
        save_tensors({name: stored(value, walk.tokens).cpu()}, out / f"{readers[0]}.safetensors")
        files |= dict.fromkeys(readers, f"{readers[0]}.safetensors")
    return InputIndex(files=files, record=walk.record)


def _sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """Return Σ x xᵀ [in, in] over all rows x of the parts [row, in], in float32."""
    total = torch.zeros(parts[0].shape[1], parts[0].shape[1], device=parts[0].device)
    for part in parts:
        total.addmm_(part.float().T, part.float())
    return total


def _pack(total: Tensor, tokens: int) -> Tensor:
    """Return the upper triangle of the mean of a symmetric sum over tokens, row by row."""
    return torch.cat([row[i:] for i, row in enumerate(total.div_(tokens).cpu())])


def _unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrix of an upper triangle, the inverse of `_pack`."""
    size = int((2 * packed.numel() + 0.25) ** 0.5)
    full = torch.empty(size, size, dtype=packed.dtype)
    start = 0
    for i in range(size):
        row = packed[start : start + size - i]
        full[i, i:] = row
        full[i:, i] = row
        start += size - i
    return full
