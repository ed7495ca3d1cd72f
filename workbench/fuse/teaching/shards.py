"""Arrays of many rows in safetensors files of bounded size, which an interrupted computation continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SHARD_BYTES = 32 * 2**20
"""Largest size of a file, unless a single row is larger."""
_CACHED = 2


@dataclass(eq=False)
class Shards:
    """Arrays that are cut into rows along their first axis.

    Attributes:
        place: Directory of the files.
        sizes: Length of each row.
        width: Bytes per element of a row, over all arrays.
        limit: Largest size of a file in bytes.
    """

    place: Path
    sizes: Sequence[int]
    width: int
    limit: int = SHARD_BYTES
    _read: dict[int, Mapping[str, NDArray[np.generic]]] = field(default_factory=dict, init=False, repr=False)
    _where: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)
    parts: list[range] = field(default_factory=list, init=False)
    """Rows of each file."""

    def __post_init__(self) -> None:
        start, filled = 0, 0
        for number, size in enumerate(self.sizes):
            if filled and (filled + size) * self.width > self.limit:
                self.parts.append(range(start, number))
                start, filled = number, 0
            self._where.append((len(self.parts), filled))
            filled += size
        self.parts.append(range(start, len(self.sizes)))

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not written yet, or are damaged."""
        return [number for number in range(len(self.parts)) if self._load(number) is None]

    def write(self, number: int, compute: Callable[[range], Mapping[str, Tensor]]) -> None:
        """Compute the rows of one file and write it; an interruption leaves no part of it.

        Args:
            number: Number of the file.
            compute: Returns the arrays of some rows, one row after another.
        """
        save_tensors(compute(self.parts[number]), self._file(number))
        self._read.pop(number, None)

    def row(self, number: int) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of one row."""
        shard, start = self._where[number]
        if shard not in self._read:
            while len(self._read) >= _CACHED:
                self._read.pop(next(iter(self._read)))
            arrays = self._load(shard)
            assert arrays is not None, self._file(shard)
            self._read[shard] = arrays
        return {name: array[start : start + self.sizes[number]] for name, array in self._read[shard].items()}

    def _file(self, number: int) -> Path:
        return self.place / f"{number:05}.safetensors"

    def _load(self, number: int) -> Mapping[str, NDArray[np.generic]] | None:
        """Read one file; return None if it does not exist, is damaged or has another number of elements."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays: Mapping[str, NDArray[np.generic]] = load_file(self._file(number))
        except (FileNotFoundError, SafetensorError):
            return None
        length = sum(self.sizes[row] for row in self.parts[number])
        return arrays if arrays and all(len(array) == length for array in arrays.values()) else None
