"""The interface of weights: a lazy mapping from names to tensors, and the buffers that tensors are read into.

A tensor is read in blocks of rows, as a matrix [rows, cols]: `cols` is its last dimension and `rows` the product of all others; a
vector has one column. A step takes weights and returns weights. Nothing is computed until a consumer (the writer, a live model)
reads a block.

Importing torch takes longer than many merges. On the CPU, the loops of `kernels.c` need only the address, the dtype and the size of a
buffer, so code between the reader and the writer takes a tensor or an `Array`, a numpy array with the part of a tensor's interface that
a merge uses. The device decides which: `NUMPY` stands for arrays. `run/device.py` chooses `NUMPY` where every loop is a compiled kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from workbench.ground.lazy import np, torch

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    NumpyArray = npt.NDArray[Any]


class NumpyDevice:
    """The CPU as the device of arrays. Records and cache keys name it like torch's CPU, because both compute the same bits."""

    type = "cpu"
    index = None

    def __str__(self) -> str:
        return self.type


NUMPY = cast("torch.device", NumpyDevice())
"""The device whose buffers are arrays."""


class Array:
    """A numpy array with the dtype of a safetensors file. The compiled loops take contiguous ones.

    Its methods do what those of `torch.Tensor` with the same name do, with the same bits.

    Args:
        data: The elements; bfloat16 as uint16.
        stored: Name of the dtype in safetensors.
    """

    __slots__ = ("data", "stored")

    def __init__(self, data: NumpyArray, stored: str) -> None:
        self.data = data
        self.stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.data.shape

    @property
    def dtype(self) -> str:
        """The name of the dtype in safetensors, where a tensor has a dtype of torch."""
        return self.stored

    @property
    def T(self) -> Array:  # noqa: N802 (the name in torch and numpy)
        """The transpose, as a view."""
        return Array(self.data.T, self.stored)

    @property
    def device(self) -> torch.device:
        """The device of arrays."""
        return NUMPY

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> Any:
        """Return a part as a view, or one element of a vector as a number."""
        part = self.data[key]
        return Array(part, self.stored) if isinstance(part, np.ndarray) else part

    def __mul__(self, factor: float) -> Array:
        """Return float32 elements times a number."""
        with np.errstate(all="ignore"):
            return Array(self.data * np.float32(factor), self.stored)

    def numel(self) -> int:
        """Return the number of elements."""
        return self.data.size

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return self.data.ctypes.data

    def numpy(self) -> NumpyArray:
        """Return the elements; bfloat16 as uint16."""
        return self.data

    def cpu(self) -> Array:
        """Return the array itself."""
        return self

    def to(self, device: torch.device) -> Array:
        """Return the array itself, because arrays have one device."""
        assert device is NUMPY, device
        return self

    def is_contiguous(self) -> bool:
        """Return whether the rows lie one after the other."""
        return self.data.flags.c_contiguous

    def contiguous(self) -> Array:
        """Return the array with its rows one after the other: itself if they are."""
        return Array(np.ascontiguousarray(self.data), self.stored)

    def view(self, *shape: Any) -> Array:
        """Return a view of another shape."""
        return Array(self.data.reshape(*shape), self.stored)

    def typed(self, stored: str) -> Array:
        """Return the bytes of a uint8 array as elements of another dtype."""
        return Array(self.data.view(_NUMPY[stored]), stored)

    def float(self) -> Array:
        """Return the elements in float32: the array itself if it has this dtype."""
        return self if self.stored == "F32" else empty_array(self.data.size, "F32").view(self.shape).copy_(self)

    def zero_(self) -> Array:
        """Set all elements to zero."""
        self.data.fill(0)
        return self

    def copy_(self, other: Array) -> Array:
        """Copy elements of the same dtype, or bfloat16 and float16 to float32, which is exact."""
        if other.stored == "BF16" and self.stored == "F32":
            np.left_shift(other.data, np.uint32(16), out=self.data.view(np.uint32), dtype=np.uint32)
            return self
        assert other.stored == self.stored or (other.stored, self.stored) == ("F16", "F32"), (other.stored, self.stored)
        np.copyto(self.data, other.data)
        return self

    def add_(self, other: Array) -> Array:
        """Add float32 elements."""
        with np.errstate(all="ignore"):  # like torch; the writer refuses results that are not finite
            np.add(self.data, other.data, out=self.data)
        return self

    def sub_(self, other: Array) -> Array:
        """Subtract float32 elements."""
        with np.errstate(all="ignore"):
            np.subtract(self.data, other.data, out=self.data)
        return self


def empty_array(size: int, stored: str) -> Array:
    """Return a flat array of any content."""
    return Array(np.empty(size, _NUMPY[stored]), stored)


def as_array(buffer: object) -> Array | None:
    """Return a buffer if it is an array, None if it is a tensor."""
    return buffer if isinstance(buffer, Array) else None


def as_tensor(buffer: Tensor) -> Tensor:
    """Return a buffer as a tensor that shares its memory."""
    array = as_array(buffer)
    if array is None:
        return buffer
    tensor = torch.from_numpy(array.data)
    return tensor.view(torch.bfloat16) if array.stored == "BF16" else tensor


# 1 MiB of float32: three or four such buffers fit into a core's L2 cache.
BLOCK_ELEMENTS = 256 * 1024
# On an accelerator, launching a kernel costs more than a cache miss.
DEVICE_BLOCK_ELEMENTS = 16 * 1024 * 1024

# Names of safetensors -> name in torch, bytes per number, kind. The checkpoint reader refuses other dtypes (F8, F4, ...), which are
# quantized.
DTYPES: dict[str, tuple[str, int, str]] = {
    "F64": ("float64", 8, "floating-point"),
    "F32": ("float32", 4, "floating-point"),
    "F16": ("float16", 2, "floating-point"),
    "BF16": ("bfloat16", 2, "floating-point"),
    "I64": ("int64", 8, "integer"),
    "I32": ("int32", 4, "integer"),
    "I16": ("int16", 2, "integer"),
    "I8": ("int8", 1, "integer"),
    "U8": ("uint8", 1, "integer"),
    "BOOL": ("bool", 1, "boolean"),
}
_NAMES = {torch_name: name for name, (torch_name, *_) in DTYPES.items()}
# Dtypes in numpy, which has no bfloat16: its bits are kept in uint16.
_NUMPY = {name: "uint16" if name == "BF16" else dtype for name, (dtype, *_) in DTYPES.items()}


def stored_name(dtype: torch.dtype | str) -> str:
    """Return the safetensors name of a torch dtype or of its name in torch: "BF16" for "bfloat16"."""
    return _NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, as a safetensors header states them. Reading headers needs no torch."""

    shape: tuple[int, ...]
    stored: str

    @classmethod
    def of(cls, shape: Iterable[int], dtype: torch.dtype | str) -> TensorSpec:
        """Return the spec of a shape and a torch dtype, given as itself or by its name."""
        return cls(tuple(shape), stored_name(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch."""
        return torch_dtype(self.stored)

    @property
    def written(self) -> str:
        """The dtype that a file states: `stored`, unless the spec is one of plain bytes that mean other numbers."""
        return self.stored

    @property
    def dtype_name(self) -> str:
        """The dtype's name in torch: "bfloat16"."""
        return DTYPES[self.stored][0]

    @property
    def itemsize(self) -> int:
        """The bytes per number."""
        return DTYPES[self.stored][1]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """The columns of the row view: the last dimension, or 1 for vectors and scalars."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """The rows of the row view."""
        return self.numel // self.cols if self.numel else 0

    @property
    def nbytes(self) -> int:
        """The size on disk in bytes."""
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        """True for floating point. Other tensors are copied, never merged."""
        return self.kind == "floating-point"

    @property
    def kind(self) -> str:
        """The kind of the numbers: "floating-point", "integer" or "boolean"."""
        return DTYPES[self.stored][2]

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Yield row ranges (start, stop) of about `elements` elements each."""
        step = max(1, elements // max(1, self.cols))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class Source(Protocol):
    """A reader of one tensor in row blocks. It is not thread-safe."""

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows start..stop, in float32 or, for integers, in the tensor's dtype."""


@runtime_checkable
class StoredSource(Source, Protocol):
    """A reader of a tensor in a file that can return the stored values."""

    def raw(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop [stop - start, cols] in the stored dtype, unchecked. The next call overwrites them."""

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise WorkbenchError if a value in rows start..stop is NaN or infinite."""


class Weights(Protocol):
    """A model's tensors under the names that the base has on disk."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The shape and dtype of every tensor, in file order."""

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor for reading; this may take a first pass over its inputs."""

    def origin(self, name: str) -> str | None:
        """Return the base's tensor that bricks update at `name`; None for a tensor that a grow step added."""


def block_elements(device: torch.device) -> int:
    """Return the number of elements of a block on a device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS


def buffer(spec: TensorSpec, device: torch.device) -> Tensor:
    """Return a flat buffer for one block of a tensor, in the dtype that `Source.read` expects."""
    size = min(spec.numel, max(spec.cols, block_elements(device)))
    return empty(size, "F32" if spec.is_float else spec.stored, device)


def empty(size: int, stored: str, device: torch.device, pinned: bool = False) -> Tensor:
    """Return a flat buffer of any content: a tensor, or for the device `NUMPY` an array.

    Args:
        size: Number of elements.
        stored: Name of the dtype in safetensors.
        device: The device.
        pinned: Whether the buffer is in page-locked memory of the host, which a CUDA device reads faster.
    """
    if device is NUMPY:
        return cast("Tensor", empty_array(size, stored))
    return torch.empty(size, dtype=torch_dtype(stored), device=device, pin_memory=pinned)


def zeros(rows: int, cols: int, device: torch.device) -> Tensor:
    """Return a matrix of zeros in float32: a tensor, or for the device `NUMPY` an array."""
    if device is NUMPY:
        return empty(rows * cols, "F32", device).zero_().view(rows, cols)
    return torch.zeros(rows, cols, device=device)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return matrices one after the other: their rows if `dim` is 0, their columns if it is 1."""
    arrays = [array for array in map(as_array, parts) if array is not None]
    if arrays:
        return cast("Tensor", Array(np.concatenate([array.data for array in arrays], dim), "F32"))
    return torch.cat(list(parts), dim)


def typed(raw: Tensor, stored: str) -> Tensor:
    """Return a buffer of bytes as elements of a dtype, given by its name in safetensors."""
    array = as_array(raw)
    return raw.view(torch_dtype(stored)) if array is None else cast("Tensor", array.typed(stored))


def torch_dtype(stored: str) -> torch.dtype:
    """Return the torch dtype of a name in safetensors."""
    dtype: torch.dtype = getattr(torch, DTYPES[stored][0])
    return dtype


def matrix(flat: Tensor, start: int, stop: int, cols: int) -> Tensor:
    """Return the start of a flat buffer as a block [stop - start, cols]."""
    return flat[: (stop - start) * cols].view(stop - start, cols)


def load(weights: Weights, name: str, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Load one complete tensor.

    Args:
        weights: The weights.
        name: The tensor.
        dtype: The dtype that a floating-point tensor is cast to, once, after computing in float32.
        device: The device of the tensor; None is the CPU.
    """
    device = device or torch.device("cpu")
    spec = weights.specs[name]
    source = weights.open(name, device)
    scratch = buffer(spec, device)
    tensor = torch.empty(spec.rows, spec.cols, dtype=dtype if spec.is_float else spec.dtype, device=device)
    for start, stop in spec.blocks(block_elements(device)):
        block = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, block)
        tensor[start:stop].copy_(block)
    return tensor.view(spec.shape)
