"""Results on disk: a JSON record beside the tensors that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from workbench import jsondoc
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor


def read_pair(folder: Path, record: str, tensors: str, label: str, made_by: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a record and its tensors.

    Args:
        folder: Their directory.
        record: Name of the JSON file.
        tensors: Name of the safetensors file.
        label: Name of the directory in messages.
        made_by: Hint on how to make the files again.

    Raises:
        WorkbenchError: If a file is missing or damaged.
    """
    try:
        content = jsondoc.read_object(folder / record, f"{label}/{record}")
        from safetensors.torch import load_file

        return content, load_file(folder / tensors)
    except (OSError, SafetensorError) as error:
        raise WorkbenchError(f"{label}/{tensors}: the file is missing or damaged ({error})", made_by) from None
