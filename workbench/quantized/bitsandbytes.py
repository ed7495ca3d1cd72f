"""bitsandbytes: 4 bits (nf4, fp4) in blocks with their largest value, which may be quantized itself, and 8 bits with one scale a row.

A weight of 4 bits is a row of bytes, high half first. Its shape stands in `quant_state`, a JSON text stored as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import HEADERS_ONLY, fields_of
from workbench.ground.lazy import torch
from workbench.quantized.folding import AGAIN, Folding, Reader, content, nibbles, unsupported
from workbench.weights.header import Entry, HeadersOnlyError, Packing
from workbench.weights.packed import Folded

if TYPE_CHECKING:
    from torch import Tensor

_STATE = ".quant_state.bitsandbytes__"
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Half the widest gap between two numbers of the format.
_SAID = {
    "nf4": "Rounding changed a value by up to 15.2 % of the largest value in its block of {}",
    "fp4": "Rounding changed a value by up to 16.7 % of the largest value in its block of {}",
}
_INT8 = (
    "int8 with a scale for each row (bitsandbytes)",
    "Rounding changed a value by up to 0.4 % of the largest value in its row.",
)
_PER_UNIT = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def fold(entries: Mapping[str, Entry], config: Mapping[str, object], dtype: str, label: str) -> Folded:
    """Return a checkpoint's tensors without companions.

    Raises:
        WorkbenchError: If a companion is missing or does not fit, or if the model has weights that bitsandbytes stores transposed.
    """
    folding = Folding(entries, dtype, label)
    for kind in ("nf4", "fp4"):
        for name in folding.ending(f"{_STATE}{kind}"):
            _add_4bit(folding, name, kind)
    for stem in folding.ending(".SCB"):
        _add_int8(folding, f"{stem}.weight")
    if folding.used and config.get("model_type") in _CONV1D:
        reason = "bitsandbytes stores the weights of Conv1D layers transposed, without a mark that says which"
        raise unsupported(label, f"model_type {config['model_type']} in bitsandbytes", reason)
    return folding.done()


def _add_4bit(folding: Folding, name: str, kind: str) -> None:
    """Add a weight of 4 bits."""
    label, state = folding.label, folding.must(f"{name}{_STATE}{kind}", name, "U8", None)
    try:
        text = content(state)
    except HeadersOnlyError:
        repository = fields_of(state.file.parent / HEADERS_ONLY).get("repository", "ORG/NAME")
        raise HeadersOnlyError(
            f"{label}: the shapes of weights in bitsandbytes {kind} stand in the tensors, and only headers were downloaded",
            f"Download the model first: hf download {repository}",
        ) from None
    where = f"{label}: {name}{_STATE}{kind} in {state.file.name}"
    said = jsondoc.as_object(jsondoc.parse(text, where, AGAIN), where, AGAIN)
    shape, size = said.get("shape"), _whole(said.get("blocksize"))
    if not (isinstance(shape, list) and shape and all(map(_whole, shape)) and size):
        raise WorkbenchError(
            f"{where}: shape {shape!r} and blocksize {said.get('blocksize')!r}; expected whole numbers from 1", AGAIN
        )
    count = math.prod(shape)
    codes = folding.must(name, name, "U8 I8 BF16 F16 F32", None)
    if codes.nbytes != (count + 1) // 2 or (codes.spec.shape[:1] == (1,) and count > 2):
        raise WorkbenchError(
            f"{label}: {name} in {codes.file.name} has {codes.nbytes} bytes in the shape {list(codes.spec.shape)}; expected "
            f"{(count + 1) // 2} bytes in one column for {shape} in quant_state",
            AGAIN,
        )
    blocks = math.ceil(count / size)
    layout: dict[str, Any] = {"blocksize": size}
    nested = "nested_blocksize" in said
    beside = {
        "absmax": folding.must(f"{name}.absmax", name, "U8" if nested else "F32", (blocks,)),
        "quant_map": folding.must(f"{name}.quant_map", name, "F32", (16,)),
    }
    if nested:
        inner, offset = _whole(said["nested_blocksize"]), said.get("nested_offset")
        if not inner or not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise WorkbenchError(
                f"{where}: nested_blocksize {said['nested_blocksize']!r} and nested_offset {offset!r}; expected numbers", AGAIN
            )
        layout |= {"nested_blocksize": inner, "nested_offset": float(offset)}
        beside["nested_absmax"] = folding.must(f"{name}.nested_absmax", name, "F32", (math.ceil(blocks / inner),))
        beside["nested_quant_map"] = folding.must(f"{name}.nested_quant_map", name, "F32", (256,))
    packing = Packing(
        kind, codes.nbytes, reader="quantized.bitsandbytes.FourBits", layout=tuple(layout.items()), beside=tuple(beside.items())
    )
    told = _SAID[kind].format(size) + (", and this value was rounded to 8 bits." if nested else ".")
    folding.add(name, codes, tuple(shape), packing, (f"{kind} (bitsandbytes{', double quantization' if nested else ''})", told))


def _whole(size: object) -> int:
    """Return a whole number from 1; 0 if it is none."""
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0


def _add_int8(folding: Folding, name: str) -> None:
    """Add a weight of 8 bits."""
    codes, stem = folding.must(name, name, "I8", None), name.removesuffix(".weight")
    shape = codes.spec.shape
    if len(shape) != 2:
        raise WorkbenchError(f"{folding.label}: {name} in {codes.file.name} is I8 {list(shape)}; expected two dimensions", AGAIN)
    scales = folding.must(f"{stem}.SCB", name, "F32", shape[:1])
    if (order := folding.take(f"{stem}.weight_format", name, "U8", (), optional=True)) and order.start is not None:
        number = content(order)[0]
        if number:
            reason = f"weight_format {number} orders bytes for a GPU; only 0 (rows) is read"
            raise unsupported(folding.label, name, reason)
    packing = Packing("I8", codes.nbytes, reader="quantized.bitsandbytes.EightBits", beside=(("SCB", scales),))
    folding.add(name, codes, shape, packing, _INT8)


class FourBits(Reader):
    """One weight of 4 bits."""

    def _values(self, start: int, stop: int) -> Tensor:
        cols, size = self._entry.spec.cols, self.about("blocksize")
        first, last = start * cols, stop * cols
        codes = nibbles(self.codes(first // 2, (last + 1) // 2, torch.uint8), high_first=True)[first % 2 :][: last - first]
        block, end = first // size, math.ceil(last / size)
        largest = self._largest(block, end).repeat_interleave(size)[first - block * size :][: last - first]
        return (self.scales("quant_map")[codes.int()] * largest).view(stop - start, cols)

    def _largest(self, start: int, stop: int) -> Tensor:
        """Return the largest values of blocks start..stop."""
        layout = dict(self._packing.layout)
        if "nested_blocksize" not in layout:
            return self.scales("absmax", start, stop)
        size = layout["nested_blocksize"]
        codes, outer = self.beside("absmax", start, stop), start // size
        scales = self.scales("nested_absmax", outer, math.ceil(stop / size))
        numbers = self.scales("nested_quant_map")[codes.int()] * scales[torch.arange(start, stop) // size - outer]
        return torch.add(numbers, layout["nested_offset"])


class EightBits(Reader):
    """One weight of 8 bits with a scale for each row."""

    def _values(self, start: int, stop: int) -> Tensor:
        cols = self._entry.spec.cols
        codes = self.codes(start * cols, stop * cols, torch.int8).view(-1, cols)
        return codes.float() * self.scales("SCB", start, stop)[:, None] * _PER_UNIT
