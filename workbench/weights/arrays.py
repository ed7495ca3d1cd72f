"""Buffers that need no torch: numpy arrays with the part of a tensor's interface that a streamed merge uses.

Importing torch takes longer than many merges. On the CPU, the loops of `kernels.c` need only the address, the dtype and the size of a
buffer, so code between the reader and the writer takes a tensor or an `Array`. Which of them it gets depends on the device that it is
called with: `HOST` stands for arrays. `run/device.py` chooses `HOST` for recipes of which every loop is a compiled kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    NumpyArray = npt.NDArray[Any]

# Name of safetensors -> dtype in numpy, which has no bfloat16: its bits are kept in uint16.
_NUMPY: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Host:
    """The CPU as the device of arrays. Records and cache keys name it like torch's CPU, because both compute the same bits."""

    type = "cpu"
    index = None

    def __str__(self) -> str:
        return self.type


HOST = cast("torch.device", Host())
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
    def T(self) -> Array:  # noqa: N802 (the name in torch and numpy)
        """The transpose, as a view."""
        return Array(self.data.T, self.stored)

    @property
    def device(self) -> torch.device:
        """The device of arrays."""
        return HOST

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
        assert device is HOST, device
        return self

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
