"""What an accelerator needs beside the CPU's code: float32 without TF32, results that repeat, and staged copies.

All threads of a run queue their work on one stream, the device's default stream. Work on one stream runs in order, so a tensor
that one thread (or the main thread) makes and another thread reads is always complete, and memory that is freed while work on it
is still queued is never handed out too early. Streams of their own would need an event or `record_stream` at each such place
(edit factors, Grams, thresholds, tensors that several readers share). What they could win is small: for a merge of three bf16
checkpoints, the copies to the device take several times as long as the kernels, and reading the files takes longer than both.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MEMORY: Any = torch.utils.deterministic
# cuBLAS sums in a fixed order only with a workspace of fixed size. Must be set before the first product on the device.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_WORKSPACE, _FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def prepare(device: torch.device) -> None:
    """Make products on a CUDA device repeatable. A workspace setting of the user's that is repeatable too is kept.

    Args:
        device: Where tensors will be computed; nothing is done for a CPU.
    """
    if device.type == "cuda" and os.environ.get(_WORKSPACE) not in _FIXED:
        os.environ[_WORKSPACE] = _FIXED[0]


@contextmanager
def exact(device: torch.device | None = None) -> Iterator[None]:
    """Compute float32 as IEEE float32: no TF32 and no bfloat16 inside products and convolutions, on CPU and CUDA.

    Uses torch's per-operator settings (torch.backends.*.fp32_precision): the older `allow_tf32` leaves out convolutions, and reading
    it raises where a program has set one of the others. The settings before are restored.

    Args:
        device: On a CUDA device, operators with a deterministic implementation also use it, so that results repeat.
    """
    operators = _operators()
    before = [operator.fp32_precision for operator in operators]
    deterministic, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _MEMORY.fill_uninitialized_memory
    for operator in operators:
        operator.fp32_precision = "ieee"
    if device is not None and device.type == "cuda":
        prepare(device)
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        torch.use_deterministic_algorithms(True, warn_only=not deterministic or warn)
        _MEMORY.fill_uninitialized_memory = False  # buffers are written before they are read
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.fp32_precision = value
        if device is not None and device.type == "cuda":
            torch.use_deterministic_algorithms(deterministic, warn_only=warn)
            _MEMORY.fill_uninitialized_memory = filled


def _operators() -> list[Any]:
    """Return torch's switches for the precision inside float32 operators: products, convolutions, recurrent layers."""
    of: Any = torch.backends
    return [of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn, of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn]


class Staging:
    """Host memory that file bytes are read into, and their copies to the device.

    On a CUDA device the memory is page-locked and there are two pieces in turn: while one is copied, the next block is read into
    the other. `room` waits until the last copy out of the piece that it returns has ended. On a CPU there is one piece, and
    `send` returns it as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._pieces = [torch.empty(0, dtype=torch.uint8) for _ in range(2 if self._cuda else 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._pieces)
        self._turn = 0

    def room(self, size: int) -> Tensor:
        """Return `size` bytes of host memory, uint8, whose content may be overwritten."""
        self._turn = (self._turn + 1) % len(self._pieces)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        if self._pieces[self._turn].numel() < size:
            self._pieces[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        return self._pieces[self._turn][:size]

    def send(self, block: Tensor) -> Tensor:
        """Return a block of the memory that `room` gave last, in any dtype and shape, on the device. The copy may still be running."""
        if self._device.type == "cpu":
            return block
        sent = block.to(self._device, non_blocking=self._cuda)
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copied[self._turn] = event
        return sent


class Landing:
    """One block of results on its way to a file: rounded and checked where it was computed, then copied to host memory.

    Args:
        elements: Most elements of a block.
        dtype: Of the file.
        device: Where blocks are computed.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rounded = torch.empty(elements, dtype=dtype, device=device)
        self._host = (
            self._rounded if device.type == "cpu" else torch.empty(elements, dtype=dtype, pin_memory=device.type == "cuda")
        )

    def rounded(self, like: Tensor) -> Tensor:
        """Return room for a block of the shape of `like`, in the file's dtype, on the device."""
        return self._rounded[: like.numel()].view(like.shape)

    def bytes_of(self, block: Tensor) -> memoryview:
        """Return the bytes of a block that `rounded` gave, in host memory. The next call overwrites them."""
        host = self._host[: block.numel()].view(block.shape)
        if self._host is not self._rounded:
            host.copy_(block)  # waits: the file is written next
        return host.view(-1).view(torch.uint8).numpy().data
