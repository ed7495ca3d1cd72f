"""Stored tensors of an adapter. Reads check for NaN and infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from workbench.errors import WorkbenchError
from workbench.identity import open_unchanged
from workbench.lazy import torch
from workbench.weights.arrays import HOST, Array, as_array
from workbench.weights.header import Entry

if TYPE_CHECKING:
    from torch import Tensor

# Magnitude bits of infinity; those of finite numbers are smaller, those of NaN larger.
_INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


@dataclass(frozen=True)
class Stored:
    """One tensor of an adapter's file.

    Attributes:
        entry: File, offset, shape and dtype of the tensor.
        key: Its name in the file.
        label: Name of the adapter in error messages, such as "brick 'math'".
    """

    entry: Entry
    key: str
    label: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.entry.spec.shape

    def read(self, device: torch.device | None = None) -> Tensor:
        """Read the whole tensor as float32.

        Raises:
            WorkbenchError: If the tensor holds NaN or infinity, or the file ends early.
        """
        return self.rows(0, self.entry.spec.rows, device).view(self.shape)

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Read rows of the tensor's 2-D view as float32, [stop - start, cols].

        Args:
            start: First row.
            stop: Row after the last one.
            device: Device of the result; None is the CPU. For `HOST`, the tensor's dtype must be one of the compiled loops.

        Raises:
            WorkbenchError: If the rows hold NaN or infinity, or the file ends early.
        """
        spec, raw = self.entry.spec, self._bytes(start, stop)
        if device is HOST:
            elements = Array(np.frombuffer(raw, np.uint8), "U8").typed(spec.stored)
            array = cast("Tensor", elements.view(stop - start, spec.cols).float())
            self._check(array, start, 0, 1)
            return array
        if not raw:
            return torch.empty(stop - start, spec.cols, device=device)
        value = torch.frombuffer(raw, dtype=spec.dtype).view(stop - start, spec.cols).float()
        self._check(value, start, 0, 1)
        return value.to(device) if device is not None else value

    def is_zero(self) -> bool:
        """Return whether every number is zero, without torch for the usual dtypes.

        Raises:
            WorkbenchError: If the tensor holds NaN or infinity, or the file ends early.
        """
        spec = self.entry.spec
        if spec.stored not in _INFINITIES:
            return not bool(self.read().any())
        bits = np.frombuffer(self._bytes(0, spec.rows), f"<u{spec.itemsize}")
        magnitudes = bits & ((1 << 8 * spec.itemsize - 1) - 1)
        if magnitudes.size and magnitudes.max() >= _INFINITIES[spec.stored]:
            self.read()  # raises the error, with the number's place
        return not magnitudes.any()

    def columns(self, first: int, step: int) -> Tensor:
        """Read columns first, first + step, … of the tensor's 2-D view as float32.

        Args:
            first: First column.
            step: Distance between columns.

        Raises:
            WorkbenchError: If the columns hold NaN or infinity.
        """
        spec = self.entry.spec
        size = spec.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            mapped = np.memmap(stream, np.uint8, "r", self.entry.offset, (spec.rows, spec.cols, size))
            chosen = torch.from_numpy(np.ascontiguousarray(mapped[:, first::step]))
        value = chosen.view(spec.dtype).view(spec.rows, -1).float()
        self._check(value, 0, first, step)
        return value

    def _bytes(self, start: int, stop: int) -> bytearray:
        """Read the stored bytes of rows start..stop."""
        width = self.entry.spec.cols * self.entry.spec.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            stream.seek(self.entry.offset + start * width)
            raw = bytearray(stream.read((stop - start) * width))
        if len(raw) != (stop - start) * width:
            raise WorkbenchError(
                f"{self.label}: {self.entry.file} ends early", "The file changed while it was being read: run the command again."
            )
        return raw

    def _check(self, value: Tensor, start: int, first: int, step: int) -> None:
        array = as_array(value)
        if value.isfinite().all() if array is None else np.isfinite(array.data).all():
            return
        numbers = value.numpy()
        row, col = (int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        index = [int(i) for i in np.unravel_index((start + row) * self.entry.spec.cols + first + col * step, self.shape)]
        raise WorkbenchError(
            f"{self.label}: {self.key} holds {float(numbers[row, col])} at {index}; expected finite numbers",
            "Train or download this adapter again.",
        )
