"""What every part of the workbench means by weights: a lazy mapping from names to tensors.

A tensor is read in blocks of rows, as a matrix [rows, cols]: `cols` is its last dimension, `rows` all others together; a
vector has one column. A step wraps weights and gives weights; nothing is computed until a consumer (the writer, a live
model) reads a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

# 1 MiB of float32: three or four such buffers stay in a core's L2 cache (mergekit.md 4.6: 128-256 Ki elements).
BLOCK_ELEMENTS = 256 * 1024
# On an accelerator the launch of a kernel costs more than a cache miss.
DEVICE_BLOCK_ELEMENTS = 16 * 1024 * 1024

# safetensors' names. What is missing here (F8, F4, ...) is quantised and refused by the checkpoint reader.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, as a safetensors header states them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Columns of the row view: the last dimension, 1 for vectors and scalars."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Rows of the row view."""
        return self.numel // self.cols if self.numel else 0

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether arithmetic is meant: integer tensors are copied, never merged."""
        return self.dtype.is_floating_point

    @property
    def kind(self) -> str:
        """Kind of its numbers: "floating-point", "integer" or "boolean"."""
        if self.is_float:
            return "floating-point"
        return "boolean" if self.dtype == torch.bool else "integer"

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Row ranges (start, stop) of about `elements` elements each."""
        step = max(1, elements // max(1, self.cols))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class Source(Protocol):
    """One tensor, readable in row blocks. Not thread-safe: one reader per source."""

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop: float32, or the tensor's own dtype for integers."""


@runtime_checkable
class StoredSource(Source, Protocol):
    """A tensor that lies in a file, readable as it is stored."""

    def raw(self, start: int, stop: int) -> Tensor:
        """Rows start..stop [stop - start, cols] in the stored dtype, unchecked, in memory that the next call reuses."""

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise for the first NaN or infinity in rows start..stop, if there is one."""


class Weights(Protocol):
    """A model's tensors under the names that the base has on disk."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's shape and dtype, in file order."""

    def open(self, name: str, device: torch.device) -> Source:
        """Prepare one tensor for reading; may take a first pass over its inputs."""

    def origin(self, name: str) -> str | None:
        """The base's tensor that bricks address at `name`; None for a tensor that growth has added."""


def block_elements(device: torch.device) -> int:
    """Elements of a block on a device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS


def buffer(spec: TensorSpec, device: torch.device) -> Tensor:
    """Room for one block of a tensor, flat, in the dtype that `Source.read` fills."""
    size = min(spec.numel, max(spec.cols, block_elements(device)))
    return torch.empty(size, dtype=torch.float32 if spec.is_float else spec.dtype, device=device)


def matrix(flat: Tensor, start: int, stop: int, cols: int) -> Tensor:
    """The front of a flat buffer as a block [stop - start, cols]."""
    return flat[: (stop - start) * cols].view(stop - start, cols)


def load(weights: Weights, name: str, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """One whole tensor, computed in float32 and cast once to `dtype`."""
    device = device or torch.device("cpu")
    spec = weights.specs[name]
    source = weights.open(name, device)
    scratch = buffer(spec, device)
    whole = torch.empty(spec.rows, spec.cols, dtype=dtype if spec.is_float else spec.dtype, device=device)
    for start, stop in spec.blocks(block_elements(device)):
        block = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, block)
        whole[start:stop].copy_(block)
    return whole.view(spec.shape)
