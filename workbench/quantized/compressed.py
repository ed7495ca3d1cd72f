"""compressed-tensors: integers of 2, 4 or 8 bits in words of 32 (`pack-quantized`), and NVFP4 (`nvfp4-pack-quantized`).

A number is (code − zero) · scale. Codes are stored from 0, the first one in the lowest bits. NVFP4 has one F8_E4M3 scale for 16 values, which
is divided by the scale of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.quantized.folding import AGAIN, Folding, Reader, content, nibbles, quantization_of, unsupported
from workbench.quantized.mxfp4 import E2M1
from workbench.weights.header import Entry, Packing
from workbench.weights.packed import Folded

if TYPE_CHECKING:
    from torch import Tensor

_BITS = (2, 4, 8)
_GROUP = 16
_UNBOUNDED = "The files state no bound for the change of a value: it depends on the algorithm (rounding, GPTQ, AWQ)."
_NVFP4 = (
    "NVFP4",
    "Rounding to the nearest changed a value by up to 1/6 of the largest value in its block of 16, and by that of its scale.",
)


def fold(entries: Mapping[str, Entry], config: Mapping[str, object], dtype: str, label: str) -> Folded:
    """Return a checkpoint's tensors without companions.

    Raises:
        WorkbenchError: If a companion is missing or does not fit, or if the model needs more than scales to be computed.
    """
    quantization, folding = quantization_of(config), Folding(entries, dtype, label)
    names = folding.ending("_packed")
    if not names:
        return folding.done()
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise unsupported(label, f"compressed-tensors with sparsity_config {sparsity['format']}", "sparse storage is not read")
    if quantization.get("transform_config"):
        raise unsupported(
            label, "compressed-tensors with a transform_config", "the model rotates activations, which weights alone do not show"
        )
    said = quantization.get("config_groups")
    groups = [group.get("weights") for group in said.values() if isinstance(group, dict)] if isinstance(said, dict) else []
    weights = [group for group in groups if isinstance(group, dict)]
    if quantization.get("format") == "nvfp4-pack-quantized":
        for name in names:
            _add_nvfp4(folding, name)
        return folding.done()
    bits = {int(group.get("num_bits") or 0) for group in weights}
    if len(bits) != 1 or not bits <= {*_BITS}:
        listed = ", ".join(sorted(map(str, bits))) or "none"
        reason = f"num_bits {listed}; read are models whose weights all have 2, 4 or 8 (versions of compressed-tensors pack others differently)"
        raise unsupported(label, "compressed-tensors pack-quantized", reason)
    for name in names:
        _add_packed(folding, name, weights, next(iter(bits)))
    return folding.done()


def _add_packed(folding: Folding, name: str, groups: list[dict[str, Any]], bits: int) -> None:
    """Add a weight of integers in words."""
    label, codes = folding.label, folding.must(f"{name}_packed", name, "I32", None)
    if len(codes.spec.shape) != 2:
        raise WorkbenchError(f"{label}: {name}_packed is I32 {list(codes.spec.shape)}; expected two dimensions", AGAIN)
    (rows, words), per = codes.spec.shape, 32 // bits
    stated = folding.must(f"{name}_shape", name, "I64 I32", (2,))
    shape = [rows, words * per]  # known from headers alone if no word has bits to spare
    if stated.start is not None:
        shape = torch.frombuffer(bytearray(content(stated)), dtype=stated.spec.dtype).tolist()
    if shape[0] != rows or shape[1] < 1 or math.ceil(shape[1] / per) != words:
        raise WorkbenchError(
            f"{label}: {name}_packed in {codes.file.name} is I32 {[rows, words]}, which does not hold {shape} numbers of {bits} bits "
            f"({name}_shape)",
            AGAIN,
        )
    cols = shape[1]
    scales = folding.must(f"{name}_scale", name, "F32 BF16 F16", None)
    many = scales.spec.shape
    count = 0 if math.prod(many) == 1 else many[1] if len(many) == 2 and many[0] == rows else 1 if many == (rows,) else -1
    order = folding.take(f"{name}_g_idx", name, "I32 I64", (cols,), optional=True)
    if count < 0 or (count and not order and cols % count):
        raise WorkbenchError(
            f"{label}: {name}_scale in {scales.file.name} is {list(many)}; expected one scale for the tensor, each row, or each group of "
            f"columns of {name} {shape}",
            AGAIN,
        )
    if not order and any(group.get("actorder") == "group" for group in groups) and count > 1:
        raise WorkbenchError(f"{label}: config.json says actorder group, but no file has {name}_g_idx", AGAIN)
    beside = [("scales", scales), *([("groups", order)] if order else [])]
    zero = folding.take(
        f"{name}_zero_point", name, "I32 I8", None, optional=all(group.get("symmetric", True) for group in groups)
    )
    if zero:
        stored, found = zero.spec.stored, zero.spec.shape
        shape = [math.ceil(rows / per) if stored == "I32" else rows, max(1, count)]
        if list(found) != shape and (count or (stored, math.prod(found)) != ("I8", 1)):
            raise WorkbenchError(
                f"{label}: {name}_zero_point in {zero.file.name} is {stored} {list(found)}; expected {shape} for the scales "
                f"{list(many)}",
                AGAIN,
            )
        beside.append(("zeros", zero))
    layout = (("bits", bits), ("groups", count))
    packing = Packing(f"I{bits}", codes.nbytes, reader="quantized.compressed.Integers", layout=layout, beside=tuple(beside))
    each = {0: "one scale for a tensor", 1: "a scale for each row"}.get(
        count, f"a scale for each {cols // max(1, count)} columns"
    )
    folding.add(name, codes, (rows, cols), packing, (f"int{bits} with {each} (compressed-tensors)", _UNBOUNDED))


def _add_nvfp4(folding: Folding, name: str) -> None:
    """Add a weight in NVFP4."""
    codes = folding.must(f"{name}_packed", name, "U8", None)
    shape = codes.spec.shape
    if len(shape) != 2 or shape[1] % (_GROUP // 2):
        raise WorkbenchError(
            f"{folding.label}: {name}_packed in {codes.file.name} is U8 {list(shape)}; expected rows of whole blocks of 8 bytes",
            AGAIN,
        )
    whole = folding.must(f"{name}_global_scale", name, "F32", None)
    if math.prod(whole.spec.shape) != 1:
        raise WorkbenchError(f"{folding.label}: {name}_global_scale is {list(whole.spec.shape)}; expected one number", AGAIN)
    scales = folding.must(f"{name}_scale", name, "F8_E4M3", (shape[0], 2 * shape[1] // _GROUP))
    beside = (("scales", scales), ("global", whole))
    packing = Packing("NVFP4", codes.nbytes, reader="quantized.compressed.Nvfp4", beside=beside)
    folding.add(name, codes, (shape[0], 2 * shape[1]), packing, _NVFP4)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the numbers [..., n · 32 / bits] in words of 32 bits [..., n], the one in the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return torch.flatten((words[..., None] >> shifts) & (2**bits - 1), -2)


class Integers(Reader):
    """One weight of integers in words."""

    def _values(self, start: int, stop: int) -> Tensor:
        cols, bits, count = self._entry.spec.cols, self.about("bits"), self.about("groups")
        width = 4 * math.ceil(cols * bits / 32)
        words = self.codes(start * width, stop * width, torch.int32).view(stop - start, -1)
        numbers = unpacked(words, bits)[:, :cols].float()
        scales = self.scales("scales", start * count, stop * count or None).view(-1, max(1, count))
        zeros = self._spread(self._zeros(start, stop))
        return torch.mul(numbers - zeros, self._spread(scales))

    def _spread(self, each: Tensor) -> Tensor:
        """Return the numbers of groups [rows, groups] for every column."""
        if each.shape[1] == 1:
            return each
        if "groups" in dict(self._packing.beside):
            group = self.beside("groups").long()
            if bool(((group < 0) | (group >= each.shape[1])).any()):
                raise WorkbenchError(
                    f"{self._name}: weight_g_idx names a group that has no scales ({each.shape[1]} groups)", AGAIN
                )
            return each[:, group]
        return each.repeat_interleave(self._entry.spec.cols // each.shape[1], dim=1)

    def _zeros(self, start: int, stop: int) -> Tensor:
        """Return the codes of zero [rows, groups], from 0."""
        bits, count = self.about("bits"), max(1, self.about("groups"))
        entry = dict(self._packing.beside).get("zeros")
        if entry is None:
            return torch.full((1, 1), 2.0 ** (bits - 1))
        if entry.spec.stored == "I8":
            numbers = self.beside("zeros") if entry.spec.numel == 1 else self.beside("zeros", start * count, stop * count)
            return torch.add(numbers.float().view(-1, count), 2 ** (bits - 1))
        per = 32 // bits
        first = start // per
        words = self.beside("zeros", first * count, math.ceil(stop / per) * count).view(-1, count)
        return unpacked(words.T, bits).T[start - first * per : stop - first * per].float()


class Nvfp4(Reader):
    """One weight in NVFP4."""

    def _values(self, start: int, stop: int) -> Tensor:
        cols = self._entry.spec.cols
        codes = nibbles(self.codes(start * cols // 2, stop * cols // 2, torch.uint8))
        numbers = torch.tensor(E2M1)[codes.int()].view(stop - start, -1, _GROUP)
        scales = self.scales("scales", start * cols // _GROUP, stop * cols // _GROUP) / self.scales("global")
        return (numbers * scales.view(stop - start, -1, 1)).flatten(1)
