"""Computation on devices and in threads: exact float32, reproducible results, staged copies, and work on tensors in several threads.

All threads of a run queue their work on one stream, the device's default stream. Work on one stream runs in order, so a tensor
that one thread creates is complete when another thread reads it, and memory that is freed while work on it is queued is not reused
too early. With one stream per thread, each place that shares a tensor (edit factors, Grams, thresholds) would need an event or
`record_stream`. The gain would be small: for a merge of three bf16 checkpoints, the copies to the device take several times as long
as the kernels, and reading the files takes longer than both.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from workbench.ground.lazy import np, torch
from workbench.weights.specs import DTYPES, NUMPY, Weights, as_array, empty, load

if TYPE_CHECKING:
    from torch import Tensor


# cuBLAS sums in a fixed order only if its workspace has a fixed size. This must be set before the first product on the device.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_WORKSPACE, _FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def prepare(device: torch.device) -> None:
    """Make products on a CUDA device reproducible; keep the user's cuBLAS workspace setting if it is reproducible too."""
    if device.type == "cuda" and os.environ.get(_WORKSPACE) not in _FIXED:
        os.environ[_WORKSPACE] = _FIXED[0]


@contextmanager
def exact(device: torch.device | None = None) -> Iterator[None]:
    """Compute float32 as IEEE float32, without TF32 or bfloat16 inside products and convolutions, on CPU and CUDA.

    This uses torch's settings per operator (torch.backends.*.fp32_precision). The older `allow_tf32` does not cover convolutions, and
    reading it raises an error if a program has used the newer settings. The previous settings are restored at the end.

    Args:
        device: On a CUDA device, operators also use their deterministic implementation if they have one, so that results are reproducible.
            Attention is computed by products: fused kernels use TF32, and sum gradients in no fixed order while missing implementations
            only warn. On the device of arrays, torch computes nothing and is not imported.
    """
    if device is NUMPY:
        yield
        return
    backends: Any = torch.backends
    memory: Any = torch.utils.deterministic
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    operators = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [operator.fp32_precision for operator in operators]
    deterministic, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    for operator in operators:
        operator.fp32_precision = "ieee"
    with ExitStack() as stack:
        if device is not None and device.type == "cuda":
            prepare(device)
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            torch.use_deterministic_algorithms(True, warn_only=not deterministic or warn)
            memory.fill_uninitialized_memory = False  # every buffer is written before it is read
        try:
            yield
        finally:
            for operator, value in zip(operators, before, strict=True):
                operator.fp32_precision = value
            if device is not None and device.type == "cuda":
                torch.use_deterministic_algorithms(deterministic, warn_only=warn)
                memory.fill_uninitialized_memory = filled


class Staging:
    """Host buffers that file bytes are read into, and their copies to the device.

    For a CUDA device there are two page-locked buffers that are used in turn: while one is copied, the next block is read into the
    other. `room` waits until the last copy out of the buffer that it returns has ended. For a CPU there is one buffer, and `send`
    returns it unchanged.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._memory = device if device is NUMPY else torch.device("cpu")
        self._pieces = [empty(0, "U8", self._memory) for _ in range(2 if self._cuda else 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._pieces)
        self._turn = 0

    def room(self, size: int) -> Tensor:
        """Return a uint8 buffer of `size` bytes in host memory."""
        self._turn = (self._turn + 1) % len(self._pieces)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        if self._pieces[self._turn].numel() < size:
            self._pieces[self._turn] = empty(size, "U8", self._memory, pinned=self._cuda)
        return self._pieces[self._turn][:size]

    def send(self, block: Tensor) -> Tensor:
        """Return a view of the last buffer from `room`, in any dtype and shape, on the device. The copy may still be running."""
        if self._device.type == "cpu":
            return block
        sent = block.to(self._device, non_blocking=self._cuda)
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copied[self._turn] = event
        return sent


class Landing:
    """The buffer for one block of results: rounded and checked on the device that computed it, then copied to host memory.

    Args:
        elements: Largest number of elements of a block.
        stored: The dtype of the file, by its name in safetensors.
        device: The device that computes the blocks.
    """

    def __init__(self, elements: int, stored: str, device: torch.device) -> None:
        self._rounded = self._host = empty(elements, stored, device)
        if device.type != "cpu":
            self._host = empty(elements, stored, torch.device("cpu"), pinned=device.type == "cuda")
        array = as_array(self._host)
        data = self._host.view(torch.uint8).numpy() if array is None else array.data.view(np.uint8)
        self._bytes, self._width = data.data, DTYPES[stored][1]

    def rounded(self, like: Tensor) -> Tensor:
        """Return a buffer on the device with the shape of `like` and the file's dtype."""
        return self._rounded[: like.numel()].view(like.shape)

    def bytes_of(self, block: Tensor) -> memoryview:
        """Return the bytes of a buffer from `rounded`, in host memory. The next call overwrites them."""
        if self._host is not self._rounded:
            # this waits for the copy, because the file is written next
            self._host[: block.numel()].view(block.shape).copy_(block)
        return self._bytes[: block.numel() * self._width]


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
    before = None if device is NUMPY else torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, threads), initializer=_begin, initargs=(indexed(device),))
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


_SMALL = 16 * 2**20
"""Bytes of a model that may wait for Python's own collection."""


def free_models(weights: Weights) -> None:
    """Free models of this size that only reference cycles keep alive, and return their memory to the system.

    A merge after a live model then needs the larger of both, not their sum. Small models wait for Python's own collection: scanning
    all objects takes 0.2 s once transformers is imported, longer than such a model is used.
    """
    if sum(spec.nbytes for spec in weights.specs.values()) > _SMALL:
        gc.collect()
        return_freed_memory()


def indexed(device: torch.device) -> torch.device:
    """Return a device by its number: "cuda" is the current device, of which each thread has its own."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _begin(device: torch.device) -> None:
    if device is NUMPY:
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
