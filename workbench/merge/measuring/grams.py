"""Gram matrices: second moments of the inputs of every linear layer on calibration texts, one decoder layer at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from workbench.errors import WorkbenchError
from workbench.files import publish, read_json, write_json
from workbench.lazy import torch
from workbench.merge.measuring.layers import LayerStack
from workbench.models.texts import Batch, TextRow, batches
from workbench.steps import MergeContext
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

INDEX = "index.json"


@dataclass(frozen=True)
class Grams:
    """One brick's Gram matrices in the cache: one file per distinct input, shared by the linear layers that read that input.

    Attributes:
        folder: Directory of the files.
        files: Tensor name of a linear layer's weight -> file name.
        record: Number of `tokens` read, and whether the model was `streamed`.
    """

    folder: Path
    files: Mapping[str, str]
    record: dict[str, Any]

    def gram(self, tensor: str, device: torch.device, off_diagonal: float = 1.0) -> Tensor:
        """Return the mean of x xᵀ over all tokens [in, in] in float32, with its off-diagonal elements scaled by a factor."""
        with safe_open(self.folder / self.files[tensor], "pt") as file:
            full = unpack(file.get_tensor("gram")).to(device)
        diagonal = full.diagonal().clone()
        full.mul_(off_diagonal).diagonal().copy_(diagonal)
        return full


def collect(context: MergeContext, brick: str, rows: Sequence[TextRow], key: str) -> Grams:
    """Return one brick's Grams from the cache, or collect them and cache them.

    Memory holds one layer of the brick's model, the hidden states of all rows and the Grams of one layer; before and after the
    layers, it holds the embeddings.

    Args:
        context: Source of the model.
        brick: Name of the brick.
        rows: Calibration texts.
        key: Cache key of the model and the texts.

    Raises:
            WorkbenchError: If the inputs of a layer are not finite, or the cached index is damaged.
    """
    place = context.cache / "grams" / key
    index = in_cache(place, lambda out: _collect(context, brick, rows, out), files=dict, record=dict)
    return Grams(place, index["files"], index["record"])


def in_cache(place: Path, measure: Callable[[Path], None], **fields: type) -> dict[str, Any]:
    """Return the index of a directory in the cache, which is measured first if it is missing or damaged.

    Args:
        place: The directory.
        measure: Function that writes the content and INDEX into an empty directory; it runs without gradients.
        fields: Name -> type of the index's fields.

    Raises:
        WorkbenchError: If the index cannot be read after the measurement.
    """
    if read_json(place / INDEX, **fields) is None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".measuring-") as name, torch.no_grad():
            made = Path(name) / "made"
            made.mkdir()
            measure(made)
            publish(made, place)
    index = read_json(place / INDEX, **fields)
    if index is None:
        raise WorkbenchError(f"{place / INDEX}: the file is damaged", f"Delete {place}; the next run measures it again.")
    return index


def _collect(context: MergeContext, brick: str, rows: Sequence[TextRow], out: Path) -> None:
    """Measure the Grams of a brick layer by layer, and write them to a directory."""
    files: dict[str, str] = {}
    walk = InputWalk(context, brick, rows, sum_of_squares)
    for gram, readers in walk:
        save_gram(gram, walk.tokens, readers[0], brick, out)
        files |= dict.fromkeys(readers, f"{readers[0]}.safetensors")
    write_json(out / INDEX, {"files": files, "record": walk.record})


@dataclass(frozen=True)
class InputWalk:
    """A pass of a brick's model over texts, one decoder layer at a time, that sums up a statistic of every linear layer's inputs.

    Attributes:
        context: Source of the model.
        brick: Name of the brick; "" is the base.
        rows: The texts.
        statistic: Function from the inputs of some tokens, parts of [token, in], to their sum.
    """

    context: MergeContext
    brick: str
    rows: Sequence[TextRow]
    statistic: Callable[[Sequence[Tensor]], Tensor]

    @cached_property
    def _data(self) -> list[Batch]:
        return list(batches(self.rows, self.context.device))

    @cached_property
    def _stack(self) -> LayerStack:
        return LayerStack.of(self.context, self.brick)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(int(batch.mask.sum()) for batch in self._data)

    @property
    def record(self) -> dict[str, Any]:
        """Number of `tokens` read, and whether the model was `streamed`."""
        return {"tokens": self.tokens, "streamed": self._stack.tensor is not None}

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield each distinct input's statistic over all tokens, with the tensor names of the linear layers that read the input.

        Raises:
            WorkbenchError: If the model does not run its layers in sequence.
        """
        stack, who = self._stack, self.brick or "base"
        depth = len(stack.layers)
        hidden, calls = stack.enter(self._data)
        for layer in range(depth):
            self.context.progress(layer, depth, f"{who}: inputs of layer {layer}")
            inputs = LayerInputs(stack.readers(layer), self.statistic)
            with stack.loaded(layer), inputs:
                for i, batch in enumerate(self._data):
                    hidden[i] = stack.run(layer, hidden[i], calls[i][layer])
                    inputs.add(batch.mask)
            yield from inputs.sums.values()
        if stack.head is not None:
            with stack.loaded():
                states = [stack.leave(batch, h)[batch.mask.bool()] for batch, h in zip(self._data, hidden, strict=True)]
            yield self.statistic(states), [stack.head]
        self.context.progress(depth, depth, f"{who}: inputs")


def save_gram(gram: Tensor, tokens: int, name: str, brick: str, out: Path) -> None:
    """Write the mean of x xᵀ [in, in] of one input, the sum divided by the number of tokens; raise WorkbenchError if it is not finite."""
    if not bool(torch.isfinite(gram).all()):
        raise WorkbenchError(
            f"brick '{brick}': the inputs of {name} on the calibration texts are NaN or infinite",
            "Train or fetch the brick again.",
        )
    save_tensors({"gram": pack(gram.div_(tokens).cpu())}, out / f"{name}.safetensors")


class LayerInputs:
    """Hooks that sum up a statistic of the inputs of linear layers while the context is open.

    Attributes:
        sums: Tensor name of an input's first reader -> (statistic over all tokens, tensor names of all readers of that input).
        tokens: Number of tokens, counted by `add`.
    """

    def __init__(self, readers: Mapping[str, nn.Module], statistic: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.sums: dict[str, tuple[Tensor, list[str]]] = {}
        self.tokens = 0
        self._readers = readers
        self._statistic = statistic
        self._seen: list[tuple[Tensor, list[str]]] = []

    def __enter__(self) -> LayerInputs:
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in self._readers.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, readers in self._seen:
                if tensor is args[0]:
                    readers.append(name)
                    return
            self._seen.append((args[0], [name]))

        return record

    def add(self, mask: Tensor) -> None:
        """Add the inputs read since the last call, without padding.

        Inputs that do not have one row per token (those of routed experts) are ignored.
        """
        self.tokens += int(mask.sum())
        for tensor, readers in self._seen:
            rows = tensor.reshape(-1, tensor.shape[-1])
            if rows.shape[0] == mask.numel():
                part = self._statistic([rows[mask.flatten().bool()]])
                if readers[0] in self.sums:
                    self.sums[readers[0]][0].add_(part)
                else:
                    self.sums[readers[0]] = (part, readers)
        self._seen = []


def sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """Return Σ x xᵀ [in, in] over all rows x of the parts [row, in], in float32."""
    total = torch.zeros(parts[0].shape[1], parts[0].shape[1], device=parts[0].device)
    for part in parts:
        total.addmm_(part.float().T, part.float())
    return total


def pack(gram: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return torch.cat([gram[i, i:] for i in range(gram.shape[0])])


def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrix of an upper triangle, the inverse of `pack`."""
    size = int((2 * packed.numel() + 0.25) ** 0.5)
    full = torch.empty(size, size, dtype=packed.dtype)
    start = 0
    for i in range(size):
        row = packed[start : start + size - i]
        full[i, i:] = row
        full[i:, i] = row
        start += size - i
    return full
