"""Weights that a file stores in fewer bits: 8-bit floats with scales, and the blocks of a GGUF file. Rows are computed in float32 on the CPU.

Layouts of 8-bit floats: DeepSeek-V3 and transformers' FineGrainedFP8 (`weight_scale_inv`, one for each block of `weight_block_size`),
compressed-tensors, FBGEMM and ModelOpt (`weight_scale`, one for a tensor, a row or a block), and plain floats without scales. A weight is
always the stored number times its scale, also where the name says "inv".

Other quantizations, such as MXFP4, are read by the parts that name them in `Part.weights`.

A GGUF file is read through a directory that stands for it: `bricks/gguf_files.py` writes config.json and tokenizer files as transformers
reads them, a link to the file, and a record of where each tensor lies, under its name in transformers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.ground.identity import FileIdentity, identity_of
from workbench.ground.lazy import torch
from workbench.weights.header import BOUNDS, PACKED, TEXT_CONFIGS, Entry, Packing, Scale, refusal
from workbench.weights.specs import DTYPES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


_FLOATS = ("F8_E4M3", "F8_E5M2")
_HERE = "weights.packed.fold"
_FLOATS_READ = ("fp8", "fbgemm_fp8", "compressed-tensors/float-quantized", "modelopt/FP8")
# Scales of activations and of the key-value cache: 8-bit inference uses them, and weights in bfloat16 do not need them.
ACTIVATIONS = re.compile(
    r"(^|[._])(input_scale|input_global_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale|prob_scale)$"
)
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_AGAIN = "The files are incomplete or damaged: download them again."


def reader_of(quantization: Any) -> str | None:
    """Return the place of the function that finds the tensors of a `quantization_config`: `fold`, or a part's. None if nothing reads it.

    A part names `quant_method`, or it with one of `format`, `quant_algo` and `bits`: "mxfp4", "gptq/4".
    """
    if not isinstance(quantization, dict) or not quantization:
        return None
    from workbench.ground.parts import parts

    method = quantization.get("quant_method")
    known = [str(method), *(f"{method}/{quantization.get(key)}" for key in ("format", "quant_algo", "bits"))]
    if any(name in _FLOATS_READ for name in known):
        return _HERE
    return next((part.weights[name] for name in known for part in parts().values() if name in part.weights), None)


@dataclass
class Folded:
    """The tensors of a checkpoint without scales.

    Attributes:
        entries: The tensors. Those with a packing have their scales in it.
        notes: Sentences for the user about what storage in 8 bits changed, without the name of the checkpoint.
    """

    entries: dict[str, Entry]
    notes: list[str] = field(default_factory=list)


def fold(entries: Mapping[str, Entry], config: Mapping[str, object], path: Path, label: str) -> Folded:
    """Put scales into the entries of the weights that they belong to, and leave out scales of activations.

    Raises:
        WorkbenchError: If a weight lacks its scales, or if the shape of scales does not say which values they belong to.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    # The dtype that the model computes in, as a name of safetensors.
    places = [config, *(config.get(name) for name in TEXT_CONFIGS)]
    named = [part.get(key) for part in places if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    dtype = next((_STORED[str(name)] for name in named if str(name) in _STORED), "BF16")
    if (place := reader_of(quantization)) and place != _HERE:
        from workbench.ground.parts import imported

        folded: Folded = imported(place)(entries, config, dtype, label)
        if not folded.notes:  # config.json says so, and no tensor does
            raise refusal(quantization, path, label)
        return folded
    packed = [name for name, entry in entries.items() if entry.packing and entry.packing.kind in _FLOATS]
    if not packed:
        return Folded(dict(entries))
    left, used = dict(entries), Counter[str]()
    scales = {name: next((scale for scale in _scale_names(name) if scale in entries), None) for name in packed}
    scaled = bool(quantization) or any(scales.values())
    for name, found in scales.items():
        entry = entries[name]
        if found is None and scaled:
            raise WorkbenchError(f"{label}: {name} holds 8-bit floats, but {path} has no {_scale_names(name)[0]}", _AGAIN)
        scale = None if found is None else _scale(name, entry, found, entries[found], quantization, label)
        if found is not None:
            left.pop(found, None)
        assert entry.packing is not None
        packing = replace(entry.packing, scale=scale)
        left[name] = replace(entry, spec=TensorSpec(entry.spec.shape, dtype), packing=packing)
        used[_described(packing)] += 1
    dropped = [name for name in left if ACTIVATIONS.search(name)]
    for name in dropped:
        del left[name]
    return Folded(left, list(_notes(used, dropped, dtype)))


def _scale_names(name: str) -> tuple[str, ...]:
    """Return the names that the scales of a tensor can have."""
    stem = name.removesuffix(".weight")
    return (f"{name}_scale_inv", f"{name}_scale", *((f"{stem}.scale",) if stem != name else ()))


def _scale(name: str, entry: Entry, found: str, scales: Entry, quantization: Mapping[str, object], label: str) -> Scale:
    """Return the scales of a tensor with the size of their blocks."""
    stored = "U8" if scales.packing and scales.packing.kind == "F8_E8M0" else scales.spec.stored
    exponents = stored == "U8" and (scales.packing is not None or quantization.get("scale_fmt") == "ue8m0")
    if (scales.packing and stored != "U8") or (not exponents and stored not in ("F32", "BF16", "F16")):
        raise WorkbenchError(
            f"{label}: {found} has dtype {scales.packing.kind if scales.packing else stored}; expected float32, bfloat16, float16 or F8_E8M0",
            "This form of 8-bit weights is not known here.",
        )
    shape, scale_shape = entry.spec.shape, scales.spec.shape
    if math.prod(scale_shape) == 1:
        scale_shape = (1,) * len(shape)
    elif len(scale_shape) < len(shape) and scale_shape == shape[: len(scale_shape)]:
        scale_shape = (*scale_shape, *(1,) * (len(shape) - len(scale_shape)))
    blocks = _blocks(shape, scale_shape, _block_size(quantization)) if len(scale_shape) == len(shape) else None
    if blocks is None:
        size = _block_size(quantization)
        stated = f"weight_block_size {list(size)}" if size else "no weight_block_size"
        raise WorkbenchError(
            f"{label}: {found} is {list(scales.spec.shape)}, which does not fit {name} {list(shape)} with {stated} in config.json",
            "Expected one scale for the tensor, for each row, or for each block of rows and columns. " + _AGAIN,
        )
    return Scale(scales.file, scales.start, stored, scale_shape, blocks, scales.identity)


def _block_size(quantization: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the rows and columns of a block that config.json states; None if it states none."""
    size = quantization.get("weight_block_size")
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and size is None:
            size = weights.get("block_structure")
            if size is None and weights.get("strategy") == "group" and type(weights.get("group_size")) is int:
                size = [1, weights["group_size"]]
    if isinstance(size, str) and re.fullmatch(r"\d+x\d+", size):
        size = [int(number) for number in size.split("x")]
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the number of values of each dimension that share a scale; None if the shapes do not say it."""
    if stated and len(shape) > 1:
        full = (*(1,) * (len(shape) - 2), *stated)
        if all(count == math.ceil(size / block) for size, count, block in zip(shape, scales, full, strict=True)):
            return full
    blocks = []
    for size, count in zip(shape, scales, strict=True):
        if count not in (1, size) and (stated or count == 0 or size % count):
            return None
        blocks.append(max(1, size // count))
    return tuple(blocks)


def _described(packing: Packing) -> str:
    """Return the kind of a packed tensor and of its scales in words."""
    scale = packing.scale
    if scale is None:
        return f"{packing.kind} without scales"
    if math.prod(scale.shape) == 1:
        return f"{packing.kind} with one scale for a tensor"
    if len(scale.shape) > 1 and all(block == 1 for block in scale.blocks[:-1]) and scale.shape[-1] == 1:
        return f"{packing.kind} with a scale for each row"
    return f"{packing.kind} with a scale for each block of {' × '.join(map(str, scale.blocks[-2:]))}"


def _notes(used: Mapping[str, int], dropped: list[str], dtype: str) -> Iterator[str]:
    """Yield the sentences on packed weights and on scales of activations."""
    name = {stored: name for name, stored in _STORED.items()}[dtype]
    for described, count in used.items():
        bound = BOUNDS[described.split()[0]]
        yield (
            f"{count} weights were stored in 8 bits ({described}). Rounding changed each value by up to {bound}. "
            f"They are read as {name}."
        )
    if dropped:
        yield (
            f"drops {len(dropped)} scales of activations ({dropped[0]}{', …' if len(dropped) > 1 else ''}), which only 8-bit inference uses"
        )


RECORD, LINK = "gguf.json", "model.gguf"
_LISTED = 4  # kinds that a sentence names


def is_gguf(path: Path) -> bool:
    """Return whether a directory stands for a GGUF file."""
    return (path / RECORD).is_file() and (path / LINK).is_symlink()


def gguf_file(path: Path) -> Path:
    """Return the GGUF file that a directory stands for."""
    return (path / LINK).resolve()


def gguf_entries(path: Path, label: str) -> tuple[dict[str, Entry], list[str]]:
    """Return the tensors of a GGUF file under their names in transformers, and sentences on what is read in another form.

    Raises:
        WorkbenchError: If the GGUF file is gone or was changed since the directory was written.
    """
    record = read_json(path / RECORD, stored=str, tensors=dict, identity=list)
    if record is None:
        raise WorkbenchError(f"{label}: {path / RECORD} is damaged", f"Remove {path}: it is made again.")
    file = gguf_file(path)
    identity = identity_of(file) if file.is_file() else None
    if identity is None or identity.storable != record["identity"]:
        problem = "is missing" if identity is None else "has changed"
        raise WorkbenchError(f"{label}: {file} {problem} since it was read first", "Name the GGUF file itself, and run again.")
    entries = {
        name: Entry(
            file,
            row["start"],
            TensorSpec(tuple(row["shape"]), record["stored"]),
            identity,
            Packing(row["kind"], row["nbytes"], heads=row.get("heads", 0), shift=row.get("shift", 0.0)),
        )
        for name, row in record["tensors"].items()
    }
    plain = all(entry.packing is not None and entry.packing.kind == entry.spec.stored for entry in entries.values())
    return entries, [] if plain else [_note(file, entries)]


def _note(file: Path, entries: dict[str, Entry]) -> str:
    """Return the sentence on how the tensors of a file are stored, and what that changed."""
    kinds = Counter(entry.packing.kind for entry in entries.values() if entry.packing)
    dtype = DTYPES[next(iter(entries.values())).spec.stored][0]
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(_LISTED)) + (" …" if len(kinds) > _LISTED else "")
    blocks = [kind for kind in kinds if kind not in DTYPES]
    text = f"{file.name} stores its tensors as {listed}. They are read as {dtype}."
    if not blocks:
        return text
    bits = 8 * sum(entry.nbytes for entry in entries.values()) / sum(entry.spec.numel for entry in entries.values())
    bounds = [f"in {kind} by up to {BOUNDS[kind]}" for kind in blocks if kind in BOUNDS]
    rest = [kind for kind in blocks if kind not in BOUNDS]
    bounds += [f"in {', '.join(rest)} by an amount without a bound that the file states"] if rest else []
    return f"{text} Quantization to {bits:.1f} bits a value changed each value, {' and '.join(bounds)}."


Reader = Callable[[Path, FileIdentity | None, int, int], bytearray]
"""Reads bytes of a file: path, expected identity, offset, number of bytes."""


class PackedSource:
    """One packed tensor; implements `specs.Source`.

    It is no `specs.StoredSource`: the stored bytes are not the numbers, so every reader gets them in float32. The scales are read when
    the source is opened; the tensor itself is read and computed in blocks of rows.
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
        values = self._values(start, stop)
        if not bool(values.isfinite().all()):
            self._refuse(values, start)
        out.copy_(values)

    def _values(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop in float32; readers of parts have their own."""
        values = self._rows(start, stop)
        if self._scales is not None:
            values = values * self._scale_rows(start, stop)
        return values + self._packing.shift if self._packing.shift else values

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
