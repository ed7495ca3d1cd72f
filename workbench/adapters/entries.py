"""Stored tensors of an adapter. Reads check for NaN and infinity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.identity import open_unchanged
from workbench.weights.checkpoint import Entry


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
            device: Device of the result; None is the CPU.

        Raises:
            WorkbenchError: If the rows hold NaN or infinity, or the file ends early.
        """
        spec = self.entry.spec
        width = spec.cols * spec.dtype.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            stream.seek(self.entry.offset + start * width)
            raw = bytearray(stream.read((stop - start) * width))
        if len(raw) != (stop - start) * width:
            raise WorkbenchError(
                f"{self.label}: {self.entry.file} ends early", "The file changed while it was being read: run the command again."
            )
        if not raw:
            return torch.empty(stop - start, spec.cols, device=device)
        value = torch.frombuffer(raw, dtype=spec.dtype).view(stop - start, spec.cols).float()
        self._check(value, start, 0, 1)
        return value.to(device) if device is not None else value

    def columns(self, first: int, step: int) -> Tensor:
        """Read columns first, first + step, … of the tensor's 2-D view as float32.

        Args:
            first: First column.
            step: Distance between columns.

        Raises:
            WorkbenchError: If the columns hold NaN or infinity.
        """
        spec = self.entry.spec
        size = spec.dtype.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            mapped = np.memmap(stream, np.uint8, "r", self.entry.offset, (spec.rows, spec.cols, size))
            chosen = torch.from_numpy(np.ascontiguousarray(mapped[:, first::step]))
        value = chosen.view(spec.dtype).view(spec.rows, -1).float()
        self._check(value, 0, first, step)
        return value

    def _check(self, value: Tensor, start: int, first: int, step: int) -> None:
        if value.isfinite().all():
            return
        row, col = (~value.isfinite()).nonzero()[0].tolist()
        flat = torch.tensor((start + row) * self.entry.spec.cols + first + col * step)
        index = [int(i) for i in torch.unravel_index(flat, self.shape)]
        raise WorkbenchError(
            f"{self.label}: {self.key} holds {value[row, col].item()} at {index}; expected finite numbers",
            "Train or download this adapter again.",
        )
