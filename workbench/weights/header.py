"""Headers of safetensors files: where a tensor lies, its shape and its dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.identity import FileIdentity, settled_identity
from workbench.weights.foreign import dequantise, is_stand_in
from workbench.weights.packing import PACKED, Packing
from workbench.weights.specs import DTYPES, TensorSpec

MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME = 1000


class HeadersOnlyError(WorkbenchError):
    """The error for reading a tensor of a file of which only the header was downloaded."""


@dataclass(frozen=True)
class Entry:
    """The place of a tensor on disk.

    Attributes:
        file: The tensor's file.
        start: Offset of the tensor's first byte; None if the file is a stand-in with a header only.
        spec: Shape and dtype.
        identity: Identity of the file when its header was read. Readers raise an error if it has changed; None skips that check.
        packing: How the numbers are computed from the stored bytes; None if they are stored as `spec` says.
    """

    file: Path
    start: int | None
    spec: TensorSpec
    identity: FileIdentity | None = field(default=None, compare=False)
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """The number of stored bytes, without those of scales."""
        return self.packing.nbytes if self.packing else self.spec.nbytes

    @property
    def offset(self) -> int:
        """The offset of the tensor's first byte; raises HeadersOnlyError if only the header was downloaded."""
        if self.start is None:
            raise HeadersOnlyError(
                f"{self.file}: only the header was downloaded, not the tensors",
                "`workbench run` and `workbench eval` download the file if the recipe names the model by its hub id.",
            )
        return self.start


def read_header(file: Path, watched: bool = True, packed: bool = False) -> dict[str, Entry]:
    """Read the header of a safetensors file.

    Args:
        file: The file.
        watched: Whether later reads raise an error if the file changes; False for a file that the caller itself writes.
        packed: Accept 8-bit floats. Their entries have the spec of a bfloat16 tensor, and a packing without scales.

    Returns:
        Tensor name -> entry, in the order of their offsets.

    Raises:
        WorkbenchError: If the file is not safetensors, is truncated, has a header over 100 MB, gaps, overlaps or a quantized dtype.
    """
    with file.open("rb") as stream:
        identity = settled_identity(stream.fileno()) if watched else None
        size = identity.size if identity else os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise WorkbenchError(
                f"{file}: not a safetensors file (a header of {length:,} bytes in a file of {size:,} bytes)",
                "The download may be incomplete: download the file again.",
            )
        text = stream.read(length)
    hint = "Download the file again."
    where = f"{file}: damaged safetensors header"
    header = jsondoc.as_object(jsondoc.parse(text, where, hint, unique=True), where, hint)
    header.pop("__metadata__", None)
    described = [_parse_entry(file, name, info) for name, info in header.items()]
    entries: dict[str, Entry] = {}
    stand_in = is_stand_in(file.parent)
    expected = 0
    for start, stop, name, dtype, shape in sorted(described):
        if dtype not in DTYPES and not (packed and dtype in PACKED):
            raise WorkbenchError(
                f"{file}: {name} has dtype {dtype}, a quantized or packed format; expected floating point",
                "Save the tensors again in bfloat16." if dtype in PACKED else dequantise(None, file.parent),
            )
        spec = TensorSpec(shape, dtype if dtype in DTYPES else "BF16")
        packing = None if dtype in DTYPES else Packing(dtype, spec.numel)
        entry = Entry(file, None if stand_in else 8 + length + start, spec, identity, packing)
        if start != expected or stop - start != entry.nbytes or min(shape, default=0) < 0:
            raise WorkbenchError(
                f"{file}: {name} has offsets {start}-{stop}, expected {expected}-{expected + entry.nbytes}",
                "The file is damaged: download it again.",
            )
        expected = stop
        entries[name] = entry
    if 8 + length + expected != size:
        raise WorkbenchError(
            f"{file}: the file has {size:,} bytes, but its header describes {8 + length + expected:,} (truncated?)",
            "Download the file again.",
        )
    return entries


def _parse_entry(file: Path, name: str, info: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Return offsets, name, dtype and shape of a header's entry; raise WorkbenchError if it is malformed."""
    if isinstance(info, dict) and len(name) <= MAX_NAME:
        offsets, shape, dtype = _sizes(info.get("data_offsets")), _sizes(info.get("shape")), info.get("dtype")
        if (
            offsets is not None
            and len(offsets) == 2
            and isinstance(dtype, str)
            and shape is not None
            and len(shape) <= MAX_DIMENSIONS
        ):
            return offsets[0], offsets[1], name, dtype, shape
    raise WorkbenchError(
        f"{file}: damaged safetensors header: {name[:80]!r} has no valid dtype, shape and data_offsets",
        "Download the file again.",
    )


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return a value as a tuple if it is a list of whole numbers from 0 to 2⁶³ - 1; None if not."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
    return tuple(value) if fits else None
