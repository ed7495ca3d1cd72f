"""Loops over one block of a tensor, in C if there is a compiler and in torch or NumPy if not, with bit-identical results.

`kernels.c` is compiled on first use into the user's cache (see `compiled`); the environment variable WORKBENCH_KERNELS=torch disables it.
Without a compiler, and on accelerators, the functions below compute the same numbers, products on accelerators excepted: every
operation rounds separately and sums run in a fixed order, so that an interrupted run can be resumed on another machine.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from workbench.lazy import torch
from workbench.weights.arrays import as_array
from workbench.weights.compiled import backend
from workbench.weights.specs import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

INFINITE = 0x7F800000
"""Magnitude bits of infinity; those of finite float32 values are smaller."""
KINDS = {"F32": 0, "BF16": 1, "F16": 2}
"""Name in safetensors -> number in kernels.c, of the dtypes that the compiled loops process."""
PRODUCTS = "products: each term and each sum rounds"
"""The order of sums in `multiply`. Keys of weights that contain products have it, so raise it when the order changes."""
_WIDTH = 64  # columns of the widest tile in kernels.c
_PIECE = 1 << 16  # elements whose sums and terms stay in a core's cache


def widen(x: Tensor, out: Tensor) -> bool:
    """Compute out = x in float32 and return whether every element is finite."""
    if library := library_for(x, out):
        return bool(library.wb_widen(pointer(x), kind_of(x), pointer(out), count_of(x)))
    out.copy_(x)
    return all_finite(out)


def difference(x: Tensor, base: Tensor, out: Tensor) -> bool:
    """Compute out = x − base, with `base` and `out` in float32, and return whether every element is finite."""
    if library := library_for(x, base, out):
        return bool(library.wb_difference(pointer(x), kind_of(x), pointer(base), pointer(out), count_of(x)))
    torch.sub(x.float(), base, out=out)
    return all_finite(out)


def combine(anchor: Tensor, scale: float, others: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> bool:
    """Compute out = scale · anchor + Σ wᵢ (xᵢ − anchor) in float32 and return whether every element is finite."""
    if library := library_for(anchor, *others, out):
        count = len(others)
        places = (ctypes.c_void_p * count)(*(x.data_ptr() for x in others))
        kinds = (ctypes.c_int * count)(*(kind_of(x) for x in others))
        factors = (ctypes.c_float * count)(*weights)
        return bool(
            library.wb_combine(
                pointer(anchor),
                kind_of(anchor),
                ctypes.c_float(scale),
                count,
                places,
                kinds,
                factors,
                pointer(out),
                count_of(out),
            )
        )
    start, wide = scratch(out, 0).copy_(anchor), scratch(out, 1)
    out.zero_()
    for x, weight in zip(others, weights, strict=True):
        out.add_(wide.copy_(x).sub_(start).mul_(as_float(weight)))
    out.add_(start if scale == 1 else start.mul_(as_float(scale)))
    return all_finite(out)


def dots(x: Tensor, y: Tensor, sums: list[float]) -> list[float]:
    """Return `sums` plus x·x, y·y and x·y.

    Each of 16 lanes sums 64 elements in float32, and the lanes are summed in float64, always in the same order.
    """
    if library := library_for(x, y):
        totals = (ctypes.c_double * 3)(*sums)
        library.wb_dots(pointer(x), kind_of(x), pointer(y), kind_of(y), totals, count_of(x))
        return list(totals)
    flat = [torch.nn.functional.pad(t.float().view(-1), (0, -t.numel() % 1024)).view(-1, 64, 16) for t in (x, y)]
    totals_so_far = []
    for (i, j), total in zip(((0, 0), (1, 1), (0, 1)), sums, strict=True):
        lanes = torch.zeros_like(flat[0][:, 0])
        for row in range(64):
            lanes.add_(flat[i][:, row] * flat[j][:, row])
        totals_so_far.append(float(np.cumsum([total, *lanes.double().view(-1).tolist()])[-1]))
    return totals_so_far


def narrow(x: Tensor, out: Tensor) -> bool:
    """Round float32 values to the dtype of `out` and return whether every rounded element is finite."""
    if library := library_for(x, out):
        loop = library.wb_narrow if kind_of(out) else library.wb_widen  # a copy, with the same check
        return bool(loop(pointer(x), kind_of(out), pointer(out), count_of(x)))
    out.copy_(x)
    return all_finite(out)


def magnitude_bits(x: Tensor) -> Tensor:
    """Return the bits of |x| for float32 values, int32; they have the same order as |x|."""
    return x.view(torch.int32) & 0x7FFFFFFF


def compiled() -> bool:
    """Return whether the loops run in C."""
    return _library() is not None


_local = threading.local()


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Compute out = left @ right, or out += left @ right, in float32.

    On the CPU, each element is a sum from 0 in the order of the rank, and every multiplication and addition rounds. A BLAS library
    chooses its own order by the shape, the processor and the number of threads. Accelerators use theirs.

    Args:
        left: [rows, rank], float32.
        right: [rank, cols], float32.
        out: [rows, cols], float32.
        add: Whether to add the product to `out`.
    """
    rank, cols = right.shape
    if library := library_for(left, right, out):
        assert all(kind_of(x) == KINDS["F32"] for x in (left, right, out))
        packed = np.empty(rank * _WIDTH, np.float32)
        sizes = (ctypes.c_size_t(size) for size in (len(left), rank, cols))
        library.wb_product(pointer(left), pointer(right), pointer(out), *sizes, int(add), ctypes.c_void_p(packed.ctypes.data))
        return
    if out.device.type != "cpu":
        torch.mm(left, right, out=out) if not add else out.addmm_(left, right)
        return
    first, second, result = left.numpy(), right.numpy(), out.numpy()
    step = max(1, _PIECE // max(1, cols))
    with np.errstate(all="ignore"):  # as in C; the caller refuses results that are not finite
        for start in range(0, len(result), step):
            piece = result[start : start + step]
            total, term = np.zeros_like(piece), np.empty_like(piece)
            for k in range(rank):
                np.add(total, np.multiply(first[start : start + step, k : k + 1], second[k], out=term), out=total)
            np.copyto(piece, np.add(piece, total, out=total) if add else total)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32, computed by `multiply`.

    Args:
        left: [rows, rank].
        right: [rank, cols].
    """
    left, right = left.float().contiguous(), right.float().contiguous()
    out = torch.empty(len(left), right.shape[1], dtype=torch.float32, device=left.device)
    multiply(left, right, out)
    return out


def scratch(like: Tensor, slot: int) -> Tensor:
    """Return a float32 buffer with the shape of a block; the thread's next call with the same slot reuses it.

    New memory would cost more time than the arithmetic.
    """
    buffers: dict[tuple[int, torch.device], Tensor] = _local.__dict__.setdefault("buffers", {})
    flat = buffers.get((slot, like.device))
    if flat is None or flat.numel() < like.numel():
        flat = buffers[slot, like.device] = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
    return flat[: like.numel()].view(like.shape)


def all_finite(x: Tensor) -> bool:
    """Return whether every element is finite."""
    # A finite sum proves it. The sum of finite elements can overflow, so only then each element is tested.
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def as_float(value: float) -> float:
    """Round a number to float32."""
    return float(ctypes.c_float(value).value)


def kind_of(x: Tensor) -> int:
    """Return the number of a buffer's dtype in kernels.c."""
    array = as_array(x)
    return _kinds()[x.dtype] if array is None else KINDS[array.stored]


@cache
def _kinds() -> dict[torch.dtype, int]:
    return {torch_dtype(stored): kind for stored, kind in KINDS.items()}


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Return a pointer to a tensor's elements; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def count_of(x: Tensor) -> ctypes.c_size_t:
    """Return the number of elements as C's size_t."""
    return ctypes.c_size_t(x.numel())


def library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled loops if they can process these tensors, else None."""
    return _library() if all(map(_fits, tensors)) else None


def _fits(x: Tensor) -> bool:
    """Return whether the compiled loops can process a buffer."""
    array = as_array(x)
    if array is not None:
        return (array.stored in KINDS or array.stored == "I32") and array.data.flags.c_contiguous
    return x.device.type == "cpu" and x.is_contiguous() and (x.dtype in _kinds() or x.dtype == torch.int32)


def _library() -> ctypes.CDLL | None:
    return backend().library
