"""Gram matrices: second moments of the inputs of every linear layer on calibration texts, one decoder layer at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from workbench.errors import WorkbenchError
from workbench.files import publish, read_json, write_json
from workbench.lazy import torch
from workbench.merge.measuring.layers import LayerStack
from workbench.models.texts import TextRow, batches
from workbench.steps import MergeContext
from workbench.weights.saving import save_tensors

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
    data = list(batches(rows, context.device))
    stack = LayerStack.of(context, brick)
    depth = len(stack.layers)
    hidden, calls = stack.enter(data)
    files: dict[str, str] = {}
    for layer in range(depth):
        context.progress(layer, depth, f"{brick}: inputs of layer {layer}")
        inputs = LayerInputs(stack.readers(layer))
        with stack.loaded(layer), inputs:
            for i, batch in enumerate(data):
                hidden[i] = stack.run(layer, hidden[i], calls[i][layer])
                inputs.add(batch.mask)
        for name, (gram, readers) in inputs.grams.items():
            save_gram(gram, inputs.tokens, name, brick, out)
            files |= dict.fromkeys(readers, f"{name}.safetensors")
    tokens = sum(int(batch.mask.sum()) for batch in data)
    if stack.head is not None:
        with stack.loaded():
            outputs = [stack.leave(batch, states)[batch.mask.bool()] for batch, states in zip(data, hidden, strict=True)]
        save_gram(sum_of_squares(outputs), tokens, stack.head, brick, out)
        files[stack.head] = f"{stack.head}.safetensors"
    context.progress(depth, depth, f"{brick}: inputs")
    write_json(out / INDEX, {"files": files, "record": {"tokens": tokens, "streamed": stack.tensor is not None}})


def save_gram(gram: Tensor, tokens: int, name: str, brick: str, out: Path) -> None:
    """Write the mean of x xᵀ [in, in] of one input, the sum divided by the number of tokens; raise WorkbenchError if it is not finite."""
    if not bool(torch.isfinite(gram).all()):
        raise WorkbenchError(
            f"brick '{brick}': the inputs of {name} on the calibration texts are NaN or infinite",
            "Train or fetch the brick again.",
        )
    save_tensors({"gram": pack(gram.div_(tokens).cpu())}, out / f"{name}.safetensors")


class LayerInputs:
    """Hooks that sum up x xᵀ over the inputs of linear layers while the context is open.

    Attributes:
        grams: Tensor name of an input's first reader -> (Σ x xᵀ [in, in], tensor names of all readers of that input).
        tokens: Number of tokens, counted by `add`.
    """

    def __init__(self, readers: Mapping[str, nn.Module]) -> None:
        self.grams: dict[str, tuple[Tensor, list[str]]] = {}
        self.tokens = 0
        self._readers = readers
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
                gram = sum_of_squares([rows[mask.flatten().bool()]])
                if readers[0] in self.grams:
                    self.grams[readers[0]][0].add_(gram)
                else:
                    self.grams[readers[0]] = (gram, readers)
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
