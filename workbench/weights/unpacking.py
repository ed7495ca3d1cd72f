"""Readers of packed tensors: blocks of rows in float32, computed on the CPU from 8-bit floats or from the blocks of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.identity import FileIdentity
from workbench.lazy import torch
from workbench.weights.header import Entry
from workbench.weights.packing import PACKED, Scale
from workbench.weights.specs import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

Reader = Callable[[Path, FileIdentity | None, int, int], bytearray]
"""Reads bytes of a file: path, expected identity, offset, number of bytes."""


class PackedSource:
    """One packed tensor; implements `specs.Source`.

    It is no `specs.StoredSource`: the stored bytes are not the numbers, so every reader gets them in float32. The scales are read when
    the source is opened; the tensor itself is read and computed in blocks of rows.

    Args:
        entry: The tensor.
        name: The checkpoint and the tensor in messages: "base: model.norm.weight".
        read_bytes: Reads bytes of a file.
    """

    def __init__(self, entry: Entry, name: str, read_bytes: Reader) -> None:
        assert entry.packing is not None
        self._entry, self._packing, self._name, self._read_bytes = entry, entry.packing, name, read_bytes
        self._scales = self._read_scales(entry.packing.scale) if entry.packing.scale else None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, cols] with rows in float32.

        Raises:
            WorkbenchError: If a value is NaN or infinite.
        """
        values = self._rows(start, stop)
        if self._scales is not None:
            values = values * self._scale_rows(start, stop)
        if self._packing.shift:
            values = values + self._packing.shift
        if not bool(values.isfinite().all()):
            self._refuse(values, start)
        out.copy_(values)

    def _rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop in the order of the model, without scales."""
        heads, rows = self._packing.heads, self._entry.spec.rows
        if not heads:
            return self._stored_rows(start, stop)
        # llama.cpp stores row i of a head's first half as row 2i, and row i of its second half as row 2i + 1. Whole heads are read.
        size = rows // heads
        first = start // size * size
        place = torch.arange(start, stop)
        inside, head = place % size, place // size * size
        order = head + torch.where(inside < size // 2, 2 * inside, 2 * inside - size + 1) - first
        return self._stored_rows(first, math.ceil(stop / size) * size)[order]

    def _stored_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the file [stop - start, cols] in float32."""
        spec, kind = self._entry.spec, self._packing.kind
        width = self._packing.nbytes // spec.rows
        data = self._read_bytes(
            self._entry.file, self._entry.identity, self._entry.offset + start * width, (stop - start) * width
        )
        if kind in PACKED or kind in DTYPES:
            dtype: torch.dtype = getattr(torch, PACKED[kind] if kind in PACKED else DTYPES[kind][0])
            return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(stop - start, spec.cols).float()
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = np.frombuffer(data, dtype=np.uint8).reshape(stop - start, width)
        with np.errstate(over="ignore", invalid="ignore"):  # `read` refuses values that are not finite, and names one
            values = dequantize(blocks, GGMLQuantizationType[kind])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(stop - start, spec.cols)

    def _read_scales(self, scale: Scale) -> Tensor:
        """Return the scales in float32."""
        count = math.prod(scale.shape)
        spec_bytes = count * DTYPES[scale.stored][1]
        start = Entry(scale.file, scale.start, self._entry.spec).offset
        data = torch.frombuffer(self._read_bytes(scale.file, scale.identity, start, spec_bytes), dtype=torch.uint8)
        if scale.stored == "U8":
            scales = data.view(torch.float8_e8m0fnu).float()
        else:
            scales = data.view(getattr(torch, DTYPES[scale.stored][0])).float()
        if not bool(scales.isfinite().all()):
            raise WorkbenchError(f"{self._name}: a scale is not a finite number", "Download this model again.")
        return scales.view(scale.shape)

    def _scale_rows(self, start: int, stop: int) -> Tensor:
        """Return the scales of rows start..stop, [stop - start, cols] or [stop - start, 1]."""
        scale, scales = self._packing.scale, self._scales
        assert scale is not None
        assert scales is not None
        shape = self._entry.spec.shape
        outer = shape[:-1] if len(shape) > 1 else shape
        index: list[Any] = []
        for place, block in zip(_unraveled(torch.arange(start, stop), outer), scale.blocks, strict=False):
            index.append(place // block)
        chosen = scales[tuple(index)] if index else scales.view(1)
        if len(shape) < 2:
            return chosen.view(-1, 1)
        if chosen.shape[-1] == 1:
            return chosen
        return chosen.repeat_interleave(scale.blocks[-1], dim=1)[:, : shape[-1]]

    def _refuse(self, values: Tensor, start: int) -> None:
        """Raise WorkbenchError with the index of the first value that is not finite."""
        row, col = (~values.isfinite()).nonzero()[0].tolist()
        spec = self._entry.spec
        flat = torch.tensor((start + row) * spec.cols + col)
        index = [int(i) for i in torch.unravel_index(flat, spec.shape)]
        raise WorkbenchError(
            f"{self._name} holds {values[row, col].item()} at {index}; expected finite numbers",
            "Quantize or download this model again.",
        )


def _unraveled(rows: Tensor, outer: tuple[int, ...]) -> list[Tensor]:
    """Return the index of rows in each dimension but the last."""
    places = []
    for size in reversed(outer):
        places.append(rows % size)
        rows = rows // size
    return places[::-1]
