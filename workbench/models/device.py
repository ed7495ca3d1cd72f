"""The device that a command computes on."""

from __future__ import annotations

import torch

from workbench.errors import UsageError, WorkbenchError
from workbench.weights.device import prepare


def pick_device(name: str) -> torch.device:
    """Return the device of `--device` and prepare it.

    Args:
        name: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.

    Raises:
        WorkbenchError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
