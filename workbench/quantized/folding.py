"""What all formats share: finding a weight's companions, and reading them in blocks of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.identity import open_unchanged
from workbench.ground.lazy import torch
from workbench.weights.header import PACKED, Entry, Packing
from workbench.weights.packed import ACTIVATIONS, Folded, PackedSource
from workbench.weights.specs import DTYPES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "The files are incomplete or damaged: download them again."


def kind_of(entry: Entry) -> str:
    """Return the dtype that a tensor has in its file."""
    return entry.packing.kind if entry.packing else entry.spec.stored


def quantization_of(config: Mapping[str, object]) -> Mapping[str, Any]:
    """Return `quantization_config`; `reader_of` has found it in config.json."""
    found = config.get("quantization_config") or config.get("compression_config")
    assert isinstance(found, dict)
    return found


def unsupported(label: str, what: str, reason: str) -> WorkbenchError:
    """Return the error for a variant of a format that is not read."""
    return WorkbenchError(
        f"{label}: {what}: {reason}",
        "Use the model that it was quantized from (`base_model` in its README), or another quantization of it.",
    )


class Folding:
    """The tensors of a checkpoint while weights take their companions.

    Args:
        entries: The stored tensors.
        dtype: Name in safetensors of the dtype that weights are read as.
        label: Name of the checkpoint in messages.
    """

    def __init__(self, entries: Mapping[str, Entry], dtype: str, label: str) -> None:
        self.left, self.dtype, self.label = dict(entries), dtype, label
        self.used: Counter[tuple[str, str]] = Counter()

    def ending(self, suffix: str) -> list[str]:
        """Return the names of tensors without a suffix, for those that end in it."""
        return [name.removesuffix(suffix) for name in self.left if name.endswith(suffix)]

    def take(self, name: str, weight: str, kinds: str, shape: tuple[int, ...] | None, optional: bool = False) -> Entry | None:
        """Remove a companion from the tensors and return it.

        Args:
            name: Its name.
            weight: The weight that it belongs to.
            kinds: Dtypes that it may have, with spaces between them.
            shape: The shape that it must have; None if any will do.
            optional: Whether it may be missing.

        Raises:
            WorkbenchError: If it is missing, or has another dtype or shape.
        """
        entry = self.left.pop(name, None)
        if entry is None:
            if optional:
                return None
            raise WorkbenchError(f"{self.label}: {weight} is quantized, but no file has {name}", AGAIN)
        if kind_of(entry) not in kinds.split() or (shape is not None and entry.spec.shape != shape):
            wanted = f"{kinds.replace(' ', ' or ')}{'' if shape is None else f' {list(shape)}'}"
            raise WorkbenchError(
                f"{self.label}: {name} in {entry.file.name} is {kind_of(entry)} {list(entry.spec.shape)}; "
                f"expected {wanted} for {weight}",
                AGAIN,
            )
        return entry

    def must(self, name: str, weight: str, kinds: str, shape: tuple[int, ...] | None) -> Entry:
        """Remove a companion that may not be missing from the tensors and return it; see `take`."""
        entry = self.take(name, weight, kinds, shape)
        assert entry is not None
        return entry

    def add(self, name: str, stored: Entry, shape: tuple[int, ...], packing: Packing, said: tuple[str, str]) -> None:
        """Add a weight, and what a note says of it: how it is stored, and what rounding changed."""
        if name in self.left:
            raise WorkbenchError(f"{self.label}: {name} is stored twice, quantized and as it is", "Remove one of the two.")
        self.left[name] = Entry(stored.file, stored.start, TensorSpec(shape, self.dtype), stored.identity, packing)
        self.used[said] += 1

    def done(self) -> Folded:
        """Return all tensors with the sentences on them. Scales of activations are left out."""
        notes = [
            f"{count} weights were stored as {stored}. {rounding} They are read as {DTYPES[self.dtype][0]}."
            for (stored, rounding), count in self.used.items()
        ]
        dropped = [name for name in self.left if ACTIVATIONS.search(name)] if notes else []
        for name in dropped:
            del self.left[name]
        if dropped:
            notes.append(f"drops {len(dropped)} scales of activations ({dropped[0]}, …), which only quantized inference uses")
        return Folded(self.left, notes)


def content(entry: Entry) -> bytes:
    """Return the bytes of a small tensor, such as a shape.

    Raises:
        HeadersOnlyError: If only the header was downloaded.
    """
    assert entry.identity is not None
    with open_unchanged(entry.file, entry.identity) as stream:
        stream.seek(entry.offset)
        return stream.read(entry.nbytes)


def nibbles(data: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the numbers of 4 bits [..., 2 n] in bytes [..., n]."""
    halves = (data >> 4, data & 15) if high_first else (data & 15, data >> 4)
    return torch.stack(halves, -1).flatten(-2)


class Reader(PackedSource):
    """A quantized weight; a format computes rows in `_values`. Companions are read when they are asked for."""

    def about(self, name: str) -> Any:
        """Return a fact of the layout."""
        return dict(self._packing.layout)[name]

    def beside(self, role: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return numbers start..stop of a companion, flat and as they are stored; all by default.

        Args:
            role: The companion's role.
            start: First number.
            stop: Number after the last one.
        """
        return self._numbers(dict(self._packing.beside)[role], start, stop)

    def scales(self, role: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return numbers of a companion in float32.

        Raises:
            WorkbenchError: If one is NaN or infinite.
        """
        numbers = self.beside(role, start, stop).float()
        if not bool(numbers.isfinite().all()):
            raise WorkbenchError(f"{self._name}: a number in its {role} is not finite", "Download this model again.")
        return numbers

    def all_scales(self) -> Tensor:
        """Return the scales that `Packing.scale` names, in float32 and in their shape."""
        assert self._scales is not None
        return self._scales

    def codes(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return bytes start..stop of the weight itself as numbers of a dtype."""
        data = self._read_bytes(self._entry.file, self._entry.identity, self._entry.offset + start, stop - start)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype)

    def _numbers(self, entry: Entry, start: int, stop: int | None) -> Tensor:
        kind = kind_of(entry)
        dtype: torch.dtype = getattr(torch, PACKED[kind] if kind in PACKED else DTYPES[kind][0])
        size = dtype.itemsize
        last = entry.nbytes // size if stop is None else stop
        data = self._read_bytes(entry.file, entry.identity, entry.offset + start * size, (last - start) * size)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype)
