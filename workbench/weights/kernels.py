"""Loops over one block of a tensor, in C if there is a compiler and in torch or NumPy if not, with bit-identical results.

`kernels.c` is compiled on first use into the user's cache; the environment variable WORKBENCH_KERNELS=torch disables it. The library
is checked before every load, and built again if it is damaged. Without a compiler, and on accelerators, the functions compute the same
numbers, products on accelerators excepted: every operation rounds separately and sums run in a fixed order, so that an interrupted run
can be resumed on another machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from workbench.ground.files import scratch_beside, sync
from workbench.ground.lazy import np, torch
from workbench.ground.project import user_caches
from workbench.weights.specs import stored_name

if TYPE_CHECKING:
    from torch import Tensor


_SOURCE = Path(__file__).with_name("kernels.c")
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = ("-O3", "-march=native", *_WIDE, "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_SYMBOLS = (
    "wb_widen", "wb_difference", "wb_combine", "wb_dots", "wb_narrow", "wb_window", "wb_find", "wb_drop_sums", "wb_sparse",
    "wb_product",
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """The implementation of the block loops in this process.

    Attributes:
        name: "c" or "torch".
        reason: The reason for using torch; None for C.
        asked: Whether the environment variable WORKBENCH_KERNELS requests torch.
        compiler: The compiler's command, if one was found.
        version: First line of the compiler's `--version`.
        file: The loaded library.
        removed: Damaged libraries that were removed.
        library: The loaded functions.
    """

    name: str
    reason: str | None = None
    asked: bool = False
    compiler: str | None = None
    version: str | None = None
    file: Path | None = None
    removed: tuple[Path, ...] = ()
    library: ctypes.CDLL | None = None

    def record(self) -> dict[str, str]:
        """Return the fields for run.json."""
        fields = {"kernels": self.name, "compiler": self.compiler, "version": self.version, "reason": self.reason}
        return {key: value for key, value in fields.items() if value is not None}


@cache
def backend() -> Backend:
    """Load the library for this processor, source and compiler; build it first if it is missing or damaged."""
    if os.environ.get("WORKBENCH_KERNELS") == "torch":
        return Backend("torch", "the environment variable WORKBENCH_KERNELS requests it", asked=True)
    if not _SOURCE.is_file():
        return Backend("torch", f"{_SOURCE.name} is missing from the installation")
    text = os.environ.get("CC") or "cc"
    try:
        command = shlex.split(text)
    except ValueError as error:
        return Backend("torch", f"the environment variable CC is not a valid command ({error}): {text}")
    if not command or shutil.which(command[0]) is None:
        return Backend("torch", f"no C compiler: {command[0] if command else text} is not on the PATH")
    reason, removed = "", list[Path]()
    try:
        answer = subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=60)  # noqa: S603 (the user's own compiler)
        version = next(iter(answer.stdout.decode(errors="replace").splitlines()), "")
    except (OSError, subprocess.SubprocessError) as error:
        return Backend("torch", f"{text} --version fails: {_message(error)}", compiler=text)
    key = xxhash.xxh3_64_hexdigest(_SOURCE.read_bytes() + repr((_FLAGS, command, answer.stdout, _processor())).encode())
    for place in user_caches():
        try:
            file, damaged = _cached(place, key)
            removed += damaged
            file = file or _build(place, key, command)
            library = _load(file)
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            reason = reason or _message(error)
            continue
        return Backend("c", None, False, text, version, file, tuple(removed), library)
    return Backend("torch", reason, False, text, version, None, tuple(removed))


def _cached(place: Path, key: str) -> tuple[Path | None, list[Path]]:
    """Return the library of a key whose bytes match the digest in its name, and the damaged libraries, which are removed.

    Every library is checked before it is loaded, because loading a truncated file kills the process with SIGBUS.
    """
    removed: list[Path] = []
    for file in sorted(place.glob(f"kernels-{key}-*.so")):
        if file.stem.rpartition("-")[2] == xxhash.xxh3_128_hexdigest(file.read_bytes()):
            return file, removed
        file.unlink(missing_ok=True)
        removed.append(file)
    return None, removed


def _build(place: Path, key: str, command: list[str]) -> Path:
    """Compile the library into a cache directory; its name contains the key and the digest of its bytes."""
    with scratch_beside(place / "kernels.so") as folder:
        built = folder / "kernels.so"
        call = [*command, *_FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(call, check=True, capture_output=True, timeout=120)  # noqa: S603
        file = place / f"kernels-{key}-{xxhash.xxh3_128_hexdigest(built.read_bytes())}.so"
        sync(built)
        built.replace(file)
        sync(place)
    return file


def _load(file: Path) -> ctypes.CDLL:
    """Load the library, and declare the result types of its functions."""
    library = ctypes.CDLL(str(file))
    for symbol in _SYMBOLS:
        getattr(library, symbol)
    library.wb_window.restype = library.wb_find.restype = ctypes.c_int64
    library.wb_dots.restype = None
    return library


def _message(error: Exception) -> str:
    """Return an error in one line, with the compiler's message if there is one."""
    output = getattr(error, "stderr", None) or b""
    lines = output.decode(errors="replace").strip().splitlines()
    line = next((line for line in lines if "error" in line), lines[0] if lines else "")
    return f"{line or error}"[:300]


def _processor() -> str:
    """Describe the processor, on which -march=native depends: machines may share a cache directory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.is_file() else []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


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
    return KINDS[_stored(x.dtype)]


@cache
def _stored(dtype: torch.dtype | str) -> str:
    """Return the name of a dtype in safetensors, which is an array's dtype."""
    return dtype if isinstance(dtype, str) else stored_name(dtype)


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Return a pointer to a tensor's elements; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def count_of(x: Tensor) -> ctypes.c_size_t:
    """Return the number of elements as C's size_t."""
    return ctypes.c_size_t(x.numel())


def library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled loops if they can process these tensors, else None."""
    fit = all(x.device.type == "cpu" and x.is_contiguous() and _stored(x.dtype) in (*KINDS, "I32") for x in tensors)
    return _library() if fit else None


def _library() -> ctypes.CDLL | None:
    return backend().library
