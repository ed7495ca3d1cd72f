"""Program that reads a file of torch.save with lists of lists of integer tensors, and prints them as JSON.

`workbench analyze import` starts it as a process of its own, under limits of memory, time and files: `weights_only` runs no code of the file,
but damaged or crafted files can still ask for much memory or crash the reader. This file is run by its path and imports nothing of the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MEMORY, SECONDS, LARGEST = 2 << 30, 60, 5_000_000
"""Bytes and processor seconds that reading may use, and the largest number of indices in a file."""


def main() -> None:
    """Read the file that the first argument names, and print its indices."""
    import torch

    limit()
    try:
        content = torch.load(sys.argv[1], map_location="cpu", weights_only=True)  # noqa: TID251  runs no code, in a limited process
    except Exception as error:  # noqa: BLE001  whatever a damaged file raises is the answer
        refuse(f"torch does not load it without running code ({type(error).__name__})")
    print_indices(content)


def limit() -> None:
    """Limit the process from here on: memory beyond what torch uses already, processor time, no written files, no new processes."""
    import resource

    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    for kind, value in (
        (resource.RLIMIT_AS, used + MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def print_indices(content: Any) -> None:
    """Print lists of lists of lists of numbers, or refuse other content."""
    import torch

    if not isinstance(content, list) or not all(isinstance(row, list) for row in content):
        refuse(f"expected a list of lists of tensors, found {kind_of(content)}")
    total = 0
    for row in content:
        for part in row:
            if not isinstance(part, torch.Tensor) or part.layout != torch.strided or part.dim() != 1:
                refuse(f"expected tensors of one dimension, found {kind_of(part)}")
            if part.numel() and (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool):
                refuse(f"expected integer tensors, found {part.dtype}")
            total += part.numel()
            if total > LARGEST:
                refuse(f"expected at most {LARGEST:,} indices")
    sys.stdout.write(json.dumps([[part.tolist() for part in row] for row in content]))


def kind_of(value: Any) -> str:
    """Return what a value is, for a message."""
    if isinstance(value, list):
        return f"a list with {type(next((v for v in value if not isinstance(v, list)), None)).__name__}"
    return type(value).__name__


def refuse(reason: str) -> None:
    """Print why the file is refused, and end with status 3."""
    sys.stderr.write(reason)
    sys.exit(3)


if __name__ == "__main__":
    main()
