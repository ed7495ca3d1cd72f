"""Atomic writes of safetensors files; operating system errors name the file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically and create its directory if necessary.

    Args:
        tensors: Name -> tensor.
        path: The file.
        metadata: Text fields for the header.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:  # the library reports operating system errors only as text
            if match := _OS_ERROR.search(str(error)):
                number = int(match[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise
