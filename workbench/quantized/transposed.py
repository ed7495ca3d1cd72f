"""GPTQ and AWQ: integers of 4 bits, stored as the transpose of a weight, with scales and zeros for each group of its columns.

The bytes of one weight are kept while its rows are read, because they are columns of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.quantized.compressed import unpacked
from workbench.quantized.folding import AGAIN, Folding, Reader, quantization_of, unsupported
from workbench.weights.header import Entry, Packing
from workbench.weights.packed import Folded
from workbench.weights.packed import Reader as ReadBytes

if TYPE_CHECKING:
    from torch import Tensor

_PER = 8
# Where the numbers of a word of AWQ stand: the second column is in its fifth half byte.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_UNBOUNDED = "The files state no bound for the change of a value."


def fold_gptq(entries: Mapping[str, Entry], config: Mapping[str, object], dtype: str, label: str) -> Folded:
    """Return a checkpoint's tensors without the companions of GPTQ.

    Raises:
        WorkbenchError: If a companion is missing or does not fit, or if zeros are stored in an unknown way.
    """
    quantization = quantization_of(config)
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise unsupported(label, f"GPTQ with checkpoint_format {form}", "only gptq and gptq_v2 are read")
    if quantization.get("is_marlin_format"):
        raise unsupported(label, "GPTQ in the order of Marlin", "that order belongs to one GPU kernel")
    # The first version stores a zero less one.
    layout = (("format", "gptq"), ("less", int(form == "gptq")))
    return _fold(Folding(entries, dtype, label), _size(quantization.get("group_size"), label), layout)


def fold_awq(entries: Mapping[str, Entry], config: Mapping[str, object], dtype: str, label: str) -> Folded:
    """Return a checkpoint's tensors without the companions of AWQ.

    Raises:
        WorkbenchError: If a companion is missing or does not fit, or if words have another order.
    """
    quantization = quantization_of(config)
    version = str(quantization.get("version") or "gemm").lower()
    if version != "gemm":
        raise unsupported(label, f"AWQ version {version}", "only the order of gemm is read")
    return _fold(Folding(entries, dtype, label), _size(quantization.get("group_size"), label), (("format", "awq"), ("less", 0)))


def _size(said: object, label: str) -> int:
    """Return the columns of a group; 0 if one group has all."""
    if type(said) is not int or said < -1 or said == 0:
        raise WorkbenchError(f"{label}: config.json: group_size {said!r}; expected a whole number from 1, or -1", AGAIN)
    return max(0, said)


def _fold(folding: Folding, size: int, layout: tuple[tuple[str, object], ...]) -> Folded:
    """Return the tensors of a checkpoint with its weights under the names of the model."""
    label, kind = folding.label, str(dict(layout)["format"])
    for stem in folding.ending(".qweight"):
        name = f"{stem}.weight"
        codes = folding.must(f"{stem}.qweight", name, "I32", None)
        if len(codes.spec.shape) != 2:
            raise WorkbenchError(f"{label}: {stem}.qweight is I32 {list(codes.spec.shape)}; expected two dimensions", AGAIN)
        cols, rows = codes.spec.shape
        cols, rows = (cols * _PER, rows) if kind == "gptq" else (cols, rows * _PER)
        groups = -(-cols // (size or cols))
        if rows % _PER:
            raise WorkbenchError(f"{label}: {name} has {rows} rows; expected a multiple of {_PER}", AGAIN)
        beside = {
            "scales": folding.must(f"{stem}.scales", name, "F16 BF16 F32", (groups, rows)),
            "zeros": folding.must(f"{stem}.qzeros", name, "I32", (groups, rows // _PER)),
        }
        if kind == "gptq" and (order := folding.take(f"{stem}.g_idx", name, "I32", (cols,), optional=True)):
            beside["groups"] = order
        known = (*layout, ("size", size or cols))
        packing = Packing(
            kind, codes.nbytes, reader="quantized.transposed.Transposed", layout=known, beside=tuple(beside.items())
        )
        said = (f"int4 with a scale for each {size or cols} columns ({kind.upper()})", _UNBOUNDED)
        folding.add(name, codes, (rows, cols), packing, said)
    return folding.done()


class Transposed(Reader):
    """One weight of GPTQ or AWQ."""

    def __init__(self, entry: Entry, name: str, read_bytes: ReadBytes) -> None:
        super().__init__(entry, name, read_bytes)
        rows, cols = entry.spec.shape
        gptq = self.about("format") == "gptq"
        self._codes = self.codes(0, entry.nbytes, torch.int32).view(-1, rows if gptq else rows // _PER)
        self._scale = self.scales("scales").view(-1, rows)
        self._zero = self._columns(self.beside("zeros").view(-1, rows // _PER), 0, rows)
        self._group = torch.arange(cols) // self.about("size")
        if "groups" in dict(self._packing.beside):
            self._group = self.beside("groups").long()
        if not bool(((self._group >= 0) & (self._group < len(self._scale))).all()):
            raise WorkbenchError(f"{name}: g_idx names a group that has no scales ({len(self._scale)} groups)", AGAIN)
        if self.about("less"):
            if bool((self._zero == 15).any()):
                reason = "a zero is stored as 15, which versions of AutoGPTQ read as 16 or as 0"
                raise unsupported(name, "GPTQ", reason)
            self._zero = self._zero + 1

    def _values(self, start: int, stop: int) -> Tensor:
        if self.about("format") == "gptq":
            codes = unpacked(self._codes[:, start:stop].T, 4)
        else:
            codes = self._columns(self._codes, start, stop).T
        zeros, scales = self._zero[self._group, start:stop].T, self._scale[self._group, start:stop].T
        return (codes.float() - zeros.float()) * scales

    def _columns(self, words: Tensor, start: int, stop: int) -> Tensor:
        """Return the numbers of columns start..stop in words that lie along the columns."""
        first = start // _PER
        numbers = unpacked(words[:, first : -(-stop // _PER)], 4)
        if self.about("format") == "awq":
            numbers = numbers.view(len(numbers), -1, _PER)[:, :, list(_PLACES)].flatten(1)
        return numbers[:, start - first * _PER : stop - first * _PER]
