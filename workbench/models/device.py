"""The device that a command computes on."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from workbench.errors import UsageError, WorkbenchError
from workbench.lazy import torch
from workbench.weights.device import prepare


def pick_device(name: str) -> torch.device:
    """Return the device of `--device` and prepare it.

    Args:
        name: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.

    Raises:
        WorkbenchError: If there is no such device, if there are several, or if it is Apple's GPU.
    """
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    if name.partition(":")[0] == "mps":
        raise UsageError(
            f"--device {name}: many steps compute in float64, which Apple's Metal does not have", "Use --device cpu."
        )
    if "," in name:
        raise UsageError(
            f"--device {name}: expected one device, because one run computes on one device",
            f"Use --device {name.partition(',')[0]}, and start other runs on other devices at the same time.",
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise WorkbenchError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", "Use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    prepare(device)
    return device


def has_cuda() -> bool:
    """Return whether torch can compute on a CUDA device. On a machine without a GPU driver, the answer needs no torch."""
    return _has_driver() and torch.cuda.is_available()


def _has_driver() -> bool:
    """Return whether NVIDIA's driver library can be loaded, or AMD's driver is present."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
