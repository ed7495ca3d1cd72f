"""Loops over one block of a tensor: in C where a compiler is there, in torch elsewhere, with the same bits.

`kernels.c` is compiled once, at first use, into the user's cache; the environment variable WORKBENCH_KERNELS=torch leaves it out.
Without a compiler, and on accelerators, the functions below compute the same numbers with torch: every operation rounds on its
own, sums run in a fixed order, so that an interrupted run may go on elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INFINITE = 0x7F800000
"""Magnitude bits of infinity: finite float32 values lie below."""
ALL_TIES = 1 << 62
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def widen(x: Tensor, out: Tensor) -> bool:
    """out = x in float32. Returns whether every element is finite."""
    if library := _for(x, out):
        return bool(library.wb_widen(_at(x), _KINDS[x.dtype], _at(out), _n(x)))
    out.copy_(x)
    return _finite(out)


def difference(x: Tensor, base: Tensor, out: Tensor) -> bool:
    """out = x − base, `base` and `out` in float32. Returns whether every element is finite."""
    if library := _for(x, base, out):
        return bool(library.wb_difference(_at(x), _KINDS[x.dtype], _at(base), _at(out), _n(x)))
    torch.sub(x.float(), base, out=out)
    return _finite(out)


def combine(anchor: Tensor, scale: float, others: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> bool:
    """out = scale · anchor + Σ wᵢ (xᵢ − anchor) in float32. Returns whether every element is finite."""
    if library := _for(anchor, *others, out):
        count = len(others)
        places = (ctypes.c_void_p * count)(*(x.data_ptr() for x in others))
        kinds = (ctypes.c_int * count)(*(_KINDS[x.dtype] for x in others))
        factors = (ctypes.c_float * count)(*weights)
        return bool(library.wb_combine(_at(anchor), _KINDS[anchor.dtype], ctypes.c_float(scale), count, places, kinds, factors,
                                       _at(out), _n(out)))  # fmt: skip
    start, wide = _scratch(out, 0).copy_(anchor), _scratch(out, 1)
    out.zero_()
    for x, weight in zip(others, weights, strict=True):
        out.add_(wide.copy_(x).sub_(start).mul_(_f32(weight)))
    out.add_(start if scale == 1 else start.mul_(_f32(scale)))
    return _finite(out)


def dots(x: Tensor, y: Tensor, sums: list[float]) -> list[float]:
    """`sums` plus x·x, y·y and x·y: float32 over 64 elements a lane, float64 beyond, in a fixed order."""
    if library := _for(x, y):
        totals = (ctypes.c_double * 3)(*sums)
        library.wb_dots(_at(x), _KINDS[x.dtype], _at(y), _KINDS[y.dtype], totals, _n(x))
        return list(totals)
    flat = [torch.nn.functional.pad(t.float().view(-1), (0, -t.numel() % 1024)).view(-1, 64, 16) for t in (x, y)]
    found = []
    for (i, j), total in zip(((0, 0), (1, 1), (0, 1)), sums, strict=True):
        lanes = torch.zeros_like(flat[0][:, 0])
        for row in range(64):
            lanes.add_(flat[i][:, row] * flat[j][:, row])
        found.append(float(np.cumsum([total, *lanes.double().view(-1).tolist()])[-1]))
    return found


def window(x: Tensor, low: int, counts: Tensor) -> int:
    """Count the magnitude bits of float32 values inside [low, low + len(counts)), int32 counts; returns how many lie above."""
    if library := _for(x):
        return int(library.wb_window(_at(x), _n(x), low, len(counts), _at(counts)))
    bits = magnitude_bits(x).view(-1)
    inside = bits[(bits >= low) & (bits < low + len(counts))].sub_(low).long()
    counts.scatter_add_(0, inside, torch.ones_like(inside, dtype=counts.dtype))
    return int((bits >= low + len(counts)).sum())


def trim(x: Tensor, threshold: int, ties: int) -> int:
    """Zero, in place, magnitudes below `threshold` (bits) and those equal to it after the first `ties`; returns the ties left."""
    if library := _for(x):
        return int(library.wb_trim(_at(x), _n(x), threshold, ties))
    magnitudes = torch.abs(x, out=_scratch(x, 0))
    equal = magnitudes == _float(threshold)
    found = int(equal.sum())
    if 0 < ties < found:
        equal &= equal.view(-1).cumsum(0).view(x.shape) > ties  # the ties that go
        x.masked_fill_(equal, 0.0)
    # |x| > below is |x| >= threshold: the next smaller float32
    torch.hardshrink(x, _float(threshold - 1) if ties else _float(threshold), out=x)
    return ties - min(ties, found)


def drop(x: Tensor, key: int, index: int, share: float, scale: float) -> None:
    """Keep, in place, each element with probability `share`, times `scale`; zero the others.

    Args:
        x: float32, the elements `index`, `index` + 1, … of a tensor.
        key: 64 bits. Element i is kept where 32 bits of SplitMix64 at counter i/2 from `key` lie below share · 2³²: the same
            on every device, for any blocks.
        share: Between 0 and 1, taken to the nearest multiple of 2⁻³².
        scale: Factor of what is kept.
    """
    below = round(share * (1 << 32))
    if library := _for(x):
        library.wb_drop(
            _at(x), _n(x), ctypes.c_uint64(key), ctypes.c_uint64(index), ctypes.c_uint64(below), ctypes.c_float(scale)
        )
        return
    count = x.numel()
    word = torch.arange(index >> 1, (index + count + 1) >> 1, dtype=torch.int64, device=x.device)
    other = torch.empty_like(word)
    word.mul_(_signed(_GOLDEN)).add_(_signed(key & _MASK))
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        word ^= _shift(word, shift, other)
        word.mul_(_signed(factor))
    keep = torch.empty(2 * len(word), device=x.device)
    torch.lt(_shift(word, 32, other), below, out=keep[1::2])
    torch.lt(word.bitwise_and_(0xFFFFFFFF), below, out=keep[::2])
    x.mul_(_f32(scale)).mul_(keep[index & 1 :][:count].view(x.shape))
    x.add_(0.0)  # -0.0 becomes 0.0, as what is dropped is everywhere


def elect(
    deltas: Sequence[Tensor], weights: Sequence[float], lam: float, *, before: bool, frequency: bool, count: bool
) -> Tensor:
    """λ times the mean of the deltas that have each element's elected sign, in place of the first delta.

    Args:
        deltas: float32, of one shape.
        weights: One a delta.
        lam: Scale of the result.
        before: Weights count in the election; else only in the mean.
        frequency: The sum of signs elects; else the sum of values.
        count: Divide by the number of agreeing deltas; else by the sum of their weights.
    """
    out = deltas[0]
    if library := _for(*deltas):
        places = (ctypes.c_void_p * len(deltas))(*(x.data_ptr() for x in deltas))
        factors = (ctypes.c_float * len(deltas))(*weights)
        library.wb_elect(len(deltas), places, factors, before, frequency, count, ctypes.c_float(lam), _at(out), _n(out))
        return out
    vote, total, mass, voice, agrees = (_scratch(out, slot) for slot in range(5))
    shares = [_f32(weight) for weight in weights]
    vote.zero_()
    for x, weight in zip(deltas, shares, strict=True):
        torch.mul(x, weight if before else 1.0, out=voice)
        vote.add_(torch.sign(voice, out=voice) if frequency else voice)
    vote.sign_()
    total.zero_()
    mass.zero_()
    for x, weight in zip(deltas, shares, strict=True):
        torch.sign(torch.mul(x, weight if before else 1.0, out=voice), out=voice)
        torch.mul(voice, vote, out=agrees).clamp_min_(0)  # 1 where the delta has the elected sign, else 0
        total.add_(torch.mul(x, weight, out=voice).mul_(agrees))
        mass.add_(agrees if count else agrees.mul_(weight))
    mass.add_(torch.eq(mass, 0, out=agrees))
    return torch.div(total, mass, out=out).mul_(_f32(lam))


def narrow(x: Tensor, out: Tensor) -> bool:
    """out = x, float32, rounded to the nearest value of out's dtype. Returns whether every element is finite then."""
    if (library := _for(x, out)) and out.dtype != torch.float32:
        return bool(library.wb_narrow(_at(x), _KINDS[out.dtype], _at(out), _n(x)))
    out.copy_(x)
    return _finite(out)


def magnitude_bits(x: Tensor) -> Tensor:
    """|x| of float32 values as integers of the same order, int32."""
    return x.view(torch.int32) & 0x7FFFFFFF


def compiled() -> bool:
    """Whether the loops run in C here."""
    return _library() is not None


_local = threading.local()


def _scratch(like: Tensor, slot: int) -> Tensor:
    """Room of a block's shape in float32, kept for the thread's next block: fresh memory costs more than the arithmetic."""
    kept: dict[tuple[int, torch.device], Tensor] = _local.__dict__.setdefault("kept", {})
    flat = kept.get((slot, like.device))
    if flat is None or flat.numel() < like.numel():
        flat = kept[slot, like.device] = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
    return flat[: like.numel()].view(like.shape)


def _finite(x: Tensor) -> bool:
    """A finite sum proves every term finite; an overflowing one does not disprove it, so only then look at each."""
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def _f32(value: float) -> float:
    """A factor as C's float has it."""
    return float(ctypes.c_float(value).value)


def _float(bits: int) -> float:
    """The float32 of magnitude bits; of -1, what lies below 0."""
    return -1.0 if bits < 0 else float(np.int32(bits).view(np.float32))


def _shift(x: Tensor, by: int, out: Tensor) -> Tensor:
    """Logical shift to the right of int64."""
    return torch.bitwise_right_shift(x, by, out=out).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _n(x: Tensor) -> ctypes.c_size_t:
    return ctypes.c_size_t(x.numel())


def _for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled loops, where these tensors are what they work on."""
    fits = all(t.device.type == "cpu" and t.is_contiguous() and (t.dtype in _KINDS or t.dtype == torch.int32) for t in tensors)
    return _library() if fits else None


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("WORKBENCH_KERNELS") == "torch" or compiler is None or not _SOURCE.is_file():
        return None
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brick-workbench"
    name = xxhash.xxh3_64_hexdigest(_SOURCE.read_bytes() + repr((_FLAGS, compiler, _processor())).encode())
    file = place / f"kernels-{name}.so"
    try:
        if not file.is_file():
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as folder:
                built = Path(folder) / "kernels.so"
                command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603 (the user's own compiler)
                built.replace(file)
        library = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError):
        return None
    library.wb_window.restype = library.wb_trim.restype = ctypes.c_int64
    library.wb_window.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p]
    library.wb_trim.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int64]
    library.wb_drop.restype = library.wb_elect.restype = library.wb_dots.restype = None
    return library


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.is_file() else []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
