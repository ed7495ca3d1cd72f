"""Checkpoints with 8-bit floats: which scales belong to which weights, and which quantizations are read.

Layouts: DeepSeek-V3 and transformers' FineGrainedFP8 (`weight_scale_inv`, one for each block of `weight_block_size`), compressed-tensors,
FBGEMM and ModelOpt (`weight_scale`, one for a tensor, a row or a block), and plain 8-bit floats without scales. A weight is always the
stored number times its scale, also where the name says "inv".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.header import Entry
from workbench.weights.packing import BOUNDS, Packing, Scale
from workbench.weights.specs import TensorSpec

_FLOATS = ("F8_E4M3", "F8_E5M2")
# Scales of activations and of the key-value cache: 8-bit inference uses them, and weights in bfloat16 do not need them.
_ACTIVATIONS = re.compile(
    r"(^|[._])(input_scale|input_global_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale|prob_scale)$"
)
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_AGAIN = "The files are incomplete or damaged: download them again."


def is_read(quantization: Any) -> bool:
    """Return whether the weights of a `quantization_config` are 8-bit floats that are read here.

    Args:
        quantization: The value of `quantization_config` in config.json.
    """
    if not isinstance(quantization, dict):
        return False
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return True
    if method == "compressed-tensors":
        return quantization.get("format") == "float-quantized"
    return method == "modelopt" and quantization.get("quant_algo") == "FP8"


@dataclass
class Folded:
    """The tensors of a checkpoint without scales.

    Attributes:
        entries: The tensors. Those with a packing have their scales in it.
        notes: Sentences for the user about what storage in 8 bits changed, without the name of the checkpoint.
    """

    entries: dict[str, Entry]
    notes: list[str] = field(default_factory=list)


def fold(entries: Mapping[str, Entry], config: Mapping[str, Any], path: Path, label: str) -> Folded:
    """Put scales into the entries of the weights that they belong to, and leave out scales of activations.

    Args:
        entries: All stored tensors.
        config: The content of config.json, unchecked.
        path: Directory of the checkpoint.
        label: The checkpoint's name in messages.

    Raises:
        WorkbenchError: If a weight lacks its scales, or if the shape of scales does not say which values they belong to.
    """
    packed = [name for name, entry in entries.items() if entry.packing and entry.packing.kind in _FLOATS]
    if not packed:
        return Folded(dict(entries))
    quantization = config.get("quantization_config") or config.get("compression_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    dtype = _dtype(config)
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
    dropped = [name for name in left if _ACTIVATIONS.search(name)]
    for name in dropped:
        del left[name]
    return Folded(left, list(_notes(used, dropped, dtype)))


def _scale_names(name: str) -> tuple[str, ...]:
    """Return the names that the scales of a tensor can have."""
    stem = name.removesuffix(".weight")
    return (f"{name}_scale_inv", f"{name}_scale", *((f"{stem}.scale",) if stem != name else ()))


def _dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that the model computes in, as a name of safetensors."""
    parts = [config, *(config.get(name) for name in TEXT_CONFIGS)]
    named = [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    return next((_STORED[str(name)] for name in named if str(name) in _STORED), "BF16")


def _scale(name: str, entry: Entry, found: str, scales: Entry, quantization: Mapping[str, Any], label: str) -> Scale:
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


def _block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
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
    fits = isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    return (size[0], size[1]) if fits and size else None


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
