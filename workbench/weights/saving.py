"""Files that exist whole or not at all: written under a temporary name, flushed to the disk, renamed.

Every error of the operating system that leaves here names its file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files import _OS_ERROR, whole

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its folder is made."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:  # the library has no OSError, only the text of one
            if found := _OS_ERROR.search(str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise
