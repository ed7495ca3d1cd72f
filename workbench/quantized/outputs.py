"""Results in the format of their base: MXFP4, and 8-bit floats with a scale for each block.

A merge is rounded from the dtype that the base is read as, which is what a run without a format writes. A block whose numbers the merge left as they were keeps the bytes of the base: rounding again may give others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import xxhash

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.quantized.folding import Reader, kind_of
from workbench.quantized.packers import Fp8, Mxfp4, Packer
from workbench.weights.checkpoint import Checkpoint, checkpoint_files
from workbench.weights.header import Entry, read_header
from workbench.weights.specs import Source, TensorSpec, Weights, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

_PER_VALUE = 34  # bytes of a unit, for each of its values: measured with experts of 2,880 × 5,760
_PER_SECOND = 12e6  # values, measured on one core
_LATER = 32
"""Weights after which the scales of a weight are written. Their codes are then computed, also by many threads, and the scales with them."""


@dataclass(frozen=True)
class Unit:
    """Whole blocks of a weight: rows that are packed together.

    Attributes:
        values: What the packed numbers are worth [rows, columns], float32.
        codes: The bytes of the numbers, as the file has them.
        scales: The scales, as the file has them.
        error: ‖packed − merged‖², ‖merged‖², and whether all blocks are those of the base.
    """

    values: Tensor
    codes: Tensor
    scales: Tensor
    error: tuple[float, float, bool]


FORMATS: Mapping[str, type[Packer]] = {"mxfp4": Mxfp4, "fp8": Fp8}
_NAMES = {"mxfp4": "MXFP4", "fp8": "8-bit floats with a scale for each block (`weight_scale_inv`)"}


def refusal(form: str, base: Checkpoint) -> tuple[str, str] | None:
    """Return why a format is not that of a base, and what to write instead; None if it is.

    Args:
        form: Value of `output: {format:}`.
        base: The base.
    """
    own = next((name for name in FORMATS if _lacking(name, base) is None), None)
    if own == form:
        return None
    hint = f"Write `format: {own}`, which the base has, or leave it out" if own else "Leave `format` out"
    return (
        f"the base is not stored in {_NAMES[form]}: {_lacking(form, base)}. A result is written in the format of its base, and in no other",
        f"{hint}: the result is then written in the dtype that the base is read as, and a quantizer that calibrates can pack it.",
    )


def _lacking(form: str, base: Checkpoint) -> str | None:
    """Return what a base lacks for a format."""
    config = _quantization(base)
    packed = {name: entry for name, entry in base.entries.items() if entry.packing}
    if not packed or not config:
        return "its weights are not quantized" if not packed else "its config.json has no quantization_config"
    if config.get("quant_method") != form:
        return f"its quant_method is {config.get('quant_method')}"
    if form == "mxfp4":
        return None
    if config.get("activation_scheme", "dynamic") != "dynamic":
        return "it has scales of activations, which belong to the weights before the merge"
    published = _published(base)
    for name, entry in packed.items():
        scale, found = entry.packing and entry.packing.scale, published.get(f"{name}_scale_inv")
        kind = found and kind_of(found)
        if entry.packing and entry.packing.kind != "F8_E4M3":
            return f"{name} is {entry.packing.kind}"
        if not scale or not found or kind not in ("F32", "F8_E8M0", "U8") or len(found.spec.shape) != len(entry.spec.shape):
            return f"{name} has no {name}_scale_inv in float32 or in exponents for its blocks"
        if list(scale.blocks[-2:]) != config.get("weight_block_size"):
            return f"{name} has no scale for each block of weight_block_size {config.get('weight_block_size')}"
    return None


def _quantization(base: Checkpoint) -> dict[str, Any]:
    """Return `quantization_config` of a base."""
    found = (jsondoc.read_cached(base.path / "config.json") or {}).get("quantization_config")
    return found if isinstance(found, dict) else {}


def _published(base: Checkpoint) -> dict[str, Entry]:
    """Return the tensors of a base's files by their names there."""
    return {
        name: entry for file in checkpoint_files(base.path, base.label) for name, entry in read_header(file, packed=True).items()
    }


@dataclass(frozen=True)
class _Measured:
    """What packing changed in one weight.

    Attributes:
        digest: Digest of what it is worth, in the dtype that the base is read as.
        error: ‖packed − merged‖².
        norm: ‖merged‖².
        same: Whether all its blocks are those of the base.
    """

    digest: str
    error: float
    norm: float
    same: bool

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


class PackedWeights:
    """A merge whose tensors are rounded as its checkpoint stores them. Implements `specs.Weights`.

    Args:
        weights: The merge.
        base: The base, which decides the tensors that are packed.
        form: Value of `output: {format:}`.
    """

    def __init__(self, weights: Weights, base: Checkpoint, form: str) -> None:
        self.specs, self.form, self.origin = weights.specs, form, weights.origin
        self._weights, self._base = weights, base
        config, published = _quantization(base), _published(base)
        self.config = {"quantization_config": config}
        """Fields of config.json that say how the checkpoint is stored."""
        self.packers = {
            name: FORMATS[form](name, entry, published, config) for name, entry in base.entries.items() if entry.packing
        }
        for name in self.packers:
            if weights.specs.get(name) != base.specs[name]:
                raise WorkbenchError(
                    f"`format: {form}`: the result has no {name} in the base's shape, so it cannot be packed as the base's",
                    "Leave `format` out of `output`.",
                )
        self.measured: dict[str, _Measured] = {}
        self.kept: dict[str, Tensor] = {}
        """Scales that were computed with the codes of their weight, and are not written yet."""

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor as it is worth after packing."""
        return self.source(name, "values", device) if name in self.packers else self._weights.open(name, device)

    @property
    def stored(self) -> Stored:
        """The tensors under the names and in the bytes of the files."""
        return Stored(self)

    def source(self, name: str, role: str, device: torch.device) -> Source:
        """Open "values", "codes" or "scales" of a packed weight."""
        return _Source(self, name, role, device)

    def units(self, name: str, device: torch.device) -> _Units:
        """Return the units of a weight, which are computed one at a time."""
        reader = Reader(self._base.entries[name], f"{self._base.label}: {name}", self._base.read_bytes)
        return _Units(self.packers[name], self.specs[name], name, self._weights.open(name, device), self._base, reader, device)

    def costs(self) -> tuple[int, float]:
        """Return the bytes that packing one weight needs besides the merge, and the seconds that one core packs all."""
        units = (
            max(b - a for a, b in pairwise(packer.edges["values"])) * self.specs[name].cols
            for name, packer in self.packers.items()
        )
        return _PER_VALUE * max(units), sum(self.specs[name].numel for name in self.packers) / _PER_SECOND

    def measure(self, device: torch.device) -> dict[str, str]:
        """Measure the weights that this process has not packed, as after an interruption, and return the digests of all."""
        for name in self.packers.keys() - self.measured.keys():
            source = _Source(self, name, "codes", device)
            for unit in range(len(self.packers[name].edges["codes"]) - 1):
                source.unit(unit)
        return {name: found.digest for name, found in self.measured.items()}

    def cost(self) -> dict[str, object]:
        """Return what packing changed: relative errors against the merge in the dtype that the base is read as. Call `measure` first."""
        found = {name: self.measured[name] for name in self.packers}
        errors = {name: one.relative for name, one in found.items()}
        worst = max(errors, key=lambda name: errors[name])
        whole = math.sqrt(math.fsum(one.error for one in found.values()) / (math.fsum(one.norm for one in found.values()) or 1.0))
        return {
            "format": self.form,
            "weights": len(found),
            "unchanged": sum(one.same for one in found.values()),
            "error": whole,
            "mean": math.fsum(errors.values()) / len(errors),
            "largest": errors[worst],
            "worst": worst,
        }


@dataclass
class _Units:
    """The units of one weight."""

    packer: Packer
    spec: TensorSpec
    name: str
    merged: Source
    base: Checkpoint
    reader: Reader
    device: torch.device
    before: Source = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.base.open(self.name, torch.device("cpu"))

    def at(self, unit: int) -> Unit:
        """Pack one unit.

        Raises:
            WorkbenchError: If a number of the merge is not finite in the dtype that the base is read as.
        """
        first, last = self.packer.edges["values"][unit : unit + 2]
        values = self._rounded(self.merged, first, last, self.device)
        if not bool(values.isfinite().all()):
            raise WorkbenchError(
                f"{self.name}: the result is not finite in {self.spec.stored} (rows {first}-{last})",
                "Lower the step's lambda or weights.",
            )
        same = values == self._rounded(self.before, first, last, torch.device("cpu"))
        values = values.float()
        parts = self.packer.kept(same), self.packer.stored(self.reader, unit), self.packer.packed(values)
        codes, scales = (torch.where(keep, old, new) for keep, old, new in zip(*parts, strict=True))
        worth = self.packer.worth(codes, scales)
        off = torch.linalg.vector_norm(worth.to(self.spec.dtype).float() - values, dtype=torch.float64).item()
        norm = torch.linalg.vector_norm(values, dtype=torch.float64).item()
        return Unit(worth, codes, scales, (off**2, norm**2, bool(same.all())))

    def _rounded(self, source: Source, first: int, last: int, device: torch.device) -> Tensor:
        """Return rows in the dtype that the base is read as."""
        rows = torch.empty(last - first, self.spec.cols, dtype=self.spec.dtype)
        work = buffer(self.spec, device)
        for start, stop in TensorSpec((last - first, self.spec.cols), "F32").blocks(block_elements(device)):
            block = matrix(work, start, stop, self.spec.cols)
            source.read(first + start, first + stop, block)
            rows[start:stop] = block.to(self.spec.dtype).cpu()
        return rows


class _Source:
    """What one weight is worth, its codes or its scales; implements `specs.Source`. A pass over all codes in order is measured."""

    def __init__(self, owner: PackedWeights, name: str, role: str, device: torch.device) -> None:
        self._owner, self._name, self._role, self._device = owner, name, role, device
        self._edges = owner.packers[name].edges[role]
        self._units: _Units | None = None
        self._last: tuple[int, Unit] | None = None
        self._digest, self._seen = xxhash.xxh3_128(), list[tuple[float, float, bool]]()
        self._scales: list[Tensor] = []
        self._known = owner.kept.pop(name, None) if role == "scales" else None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out` [stop - start, columns] with rows."""
        if self._known is not None:
            out.copy_(self._known.view(-1, out.shape[1])[start:stop])
            return
        row = start
        while row < stop:
            number = bisect_right(self._edges, row) - 1
            first, last = self._edges[number], min(stop, self._edges[number + 1])
            part = getattr(self.unit(number), self._role).reshape(-1, out.shape[1])
            out[row - start : last - start].copy_(part[row - first : last - first])
            row = last

    def unit(self, number: int) -> Unit:
        """Return a unit, which is kept until another one is asked for."""
        if self._last is None or self._last[0] != number:
            self._units = self._units or self._owner.units(self._name, self._device)
            self._last = None  # its memory goes first
            unit = self._units.at(number)
            self._last = number, unit
            if self._role == "codes" and number == len(self._seen):
                self._see(unit)
        return self._last[1]

    def _see(self, unit: Unit) -> None:
        """Add a unit to what is measured."""
        dtype = self._owner.specs[self._name].dtype
        self._digest.update(unit.values.to(dtype).contiguous().view(torch.uint8).numpy().data)
        self._seen.append(unit.error)
        self._scales.append(unit.scales)
        if len(self._seen) < len(self._edges) - 1:
            return
        off, norm, same = zip(*self._seen, strict=True)
        self._owner.kept[self._name] = torch.cat([scales.flatten() for scales in self._scales])
        self._owner.measured[self._name] = _Measured(self._digest.hexdigest(), math.fsum(off), math.fsum(norm), all(same))


class Stored:
    """Packed weights under the names and in the bytes of the files. Implements `specs.Weights`.

    Attributes:
        specs: Names and shapes in the order of the files.
    """

    def __init__(self, owner: PackedWeights) -> None:
        self._owner, self._roles = owner, dict[str, tuple[str, str]]()
        self.specs: dict[str, TensorSpec] = {}
        for name, (stored, spec) in _ordered(owner):
            self.specs[stored] = spec
            if name:
                self._roles[stored] = name, "codes" if stored == owner.packers[name].codes[0] else "scales"

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor."""
        return self._owner.source(*self._roles[name], device) if name in self._roles else self._owner.open(name, device)

    def origin(self, name: str) -> str | None:
        """Return the name itself."""
        return name


def _ordered(owner: PackedWeights) -> Iterator[tuple[str, tuple[str, TensorSpec]]]:
    """Yield the weight ("" for a tensor that is stored as it is) and the name and spec of each tensor of the files."""
    waiting: list[str] = []
    for name, spec in owner.specs.items():
        if name not in owner.packers:
            yield "", (name, spec)
            continue
        yield name, owner.packers[name].codes
        waiting.append(name)
        if len(waiting) > _LATER:
            yield waiting[0], owner.packers[waiting.pop(0)].scales
    for name in waiting:
        yield name, owner.packers[name].scales
