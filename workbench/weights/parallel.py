"""Work on tensors in several threads, with the same numbers as in one thread."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.weights.arrays import HOST
from workbench.weights.specs import Weights, load

if TYPE_CHECKING:
    from torch import Tensor

# malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def default_threads() -> int:
    """Return the number of cores, at most 8, since more threads only compete for memory bandwidth."""
    return min(8, os.cpu_count() or 1)


def each(work: Callable[[str], None], names: Iterable[str], threads: int, device: torch.device | None = None) -> None:
    """Call `work` for every tensor, in file order, on several threads; stop at the first error.

    On a CUDA device all threads queue work on one stream; see `weights/device.py`. While one thread reads a file, the device copies
    and computes for the others.

    Torch itself computes on one thread meanwhile: its threads gain nothing on blocks that fit a core's cache (on a busy machine
    they wait for each other thirty times longer than they work), and a matrix product's last bits may depend on their number.

    Args:
        work: Called with a tensor's name.
        names: Names of the tensors.
        threads: Number of threads.
        device: The device that `work` computes on; None is the CPU. On the device of arrays, torch is not used.
    """
    device = device or torch.device("cpu")
    _keep_freed_memory()
    before = None if device is HOST else torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, threads), initializer=_begin, initargs=(device,))
    try:
        futures = [pool.submit(work, name) for name in names]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:  # of several errors, the first tensor's is raised
            if future in finished:
                future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is not None:
            torch.set_num_threads(before)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that the last bits of sums and products do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor's buffers; returning and faulting it in again costs a tenth of a merge's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 26)
        mallopt(_TRIM_THRESHOLD, 1 << 27)


def peak_bytes() -> int:
    """Return the peak resident memory of this process since its start, in bytes; 0 on Windows, which does not tell it this way."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Let glibc return memory that was freed, so that it does not count as memory of what runs next; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _begin(device: torch.device) -> None:
    if device is HOST:
        return
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the default of a new thread is device 0


def load_all(weights: Weights, dtype: torch.dtype | None, device: torch.device, threads: int | None = None) -> dict[str, Tensor]:
    """Load every tensor, computed in float32 and cast once, with the same bytes as a written file.

    Args:
        weights: The weights.
        dtype: The dtype of floating-point tensors; None keeps the dtype of each tensor.
        device: The device of the tensors.
        threads: Number of threads; None chooses by the number of cores.
    """
    loaded: dict[str, Tensor] = {}

    def work(name: str) -> None:
        loaded[name] = load(weights, name, dtype or weights.specs[name].dtype, device)

    each(work, weights.specs, threads or default_threads(), device)
    return {name: loaded[name] for name in weights.specs}
