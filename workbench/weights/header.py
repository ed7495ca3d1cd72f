"""What the files of a model say: safetensors headers, fields of config.json, and numbers in fewer bits. Small files are written at once.

A model that cannot be read gets the command that converts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import atomic_write, scratch_beside
from workbench.ground.foreign_names import HEADERS_ONLY, TOKENIZER_TOO, convert_command
from workbench.ground.identity import FileIdentity, settled_identity
from workbench.ground.recognize import look
from workbench.weights.specs import DTYPES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


MAX_LAYERS = 10_000
MAX_SIZE = 2**40
# Fields for the number of layers, the number of positions, and the text decoder of a multimodal model; `models/architecture.py` reads
# them. If several of POSITIONS are set, the first one counts, as in lm-eval.
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
TEXT_CONFIGS = ("text_config", "llm_config")
_PARTS = (*TEXT_CONFIGS, "vision_config", "audio_config")
_NAME_BYTES = 255


def is_file_name(name: str) -> bool:
    """Return whether a text from an untrusted file is a plain file name: no path, no NUL, not too long for a file system."""
    is_plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    try:
        return is_plain and len(os.fsencode(name)) <= _NAME_BYTES
    except UnicodeEncodeError:  # an unpaired surrogate
        return False


def _is_integer_up_to(limit: int) -> Callable[[Any], bool]:
    return lambda value: (type(value) is int or (type(value) is float and value.is_integer())) and 0 <= value <= limit


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_token(value: Any) -> bool:
    is_integer = type(value) is int and abs(value) < 2**31
    return is_integer or (isinstance(value, list) and all(type(number) is int and abs(number) < 2**31 for number in value))


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number of a usual size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


_LAYERS = f"a whole number from 0 to {MAX_LAYERS:,}"
_SIZE = "a whole number from 0"
# Field -> (test, description of the expected value). null is always allowed: transformers then takes its default.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(DEPTHS, (_is_integer_up_to(MAX_LAYERS), _LAYERS)),
    **dict.fromkeys(("vocab_size", "n_embd", "d_model", *POSITIONS), (_is_integer_up_to(MAX_SIZE), _SIZE)),
    "model_type": (lambda value: isinstance(value, str), "a text"),
    "architectures": (_is_list_of_texts, "a list of texts"),
    "layer_types": (_is_list_of_texts, "a list of texts"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "initializer_range": (is_number, "a number"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (_is_token, "a token id, or a list of them")),
    **dict.fromkeys(
        (*_PARTS, "auto_map", "rope_scaling", "rope_parameters"), (lambda value: isinstance(value, dict), "an object")
    ),
}


def check_config(config: Mapping[str, object], label: str) -> None:
    """Check the fields of config.json that the workbench reads, including those of parts such as `text_config`.

    Raises:
        WorkbenchError: If a field has the wrong type or a number is out of range. The message names file and field.
    """
    check_fields(config, _FIELDS, label)
    for name in _PARTS:
        if isinstance(part := config.get(name), dict):
            check_fields(part, _FIELDS, f"{label}: {name}")


def check_fields(content: Mapping[str, object], fields: Mapping[str, tuple[Callable[[Any], bool], str]], label: str) -> None:
    """Check the fields of an untrusted JSON object; null is always valid.

    Args:
        content: The object. Fields without an entry in `fields` are ignored.
        fields: Field -> (test, description of the expected value).
        label: The object's name in messages.

    Raises:
        WorkbenchError: If a field is invalid.
    """
    for name, value in content.items():
        test, expected = fields.get(name, (None, ""))
        if test is not None and value is not None and not test(value):
            actual = jsondoc.kind(value) if isinstance(value, (dict, list)) else repr(value)[:60]
            raise WorkbenchError(
                f"{label}: {name}: expected {expected}, found {actual}", "The file is damaged: download it again."
            )


# Dtypes of safetensors that hold 8-bit floats -> name in torch.
PACKED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}

# Largest change of a value when it is rounded to a kind of storage. The fp8 bounds are half a step of the mantissa; they hold for
# values that are not close to zero. The bounds of GGUF kinds follow from the steps of a block (llama.cpp, ggml-quants.c); kinds with
# scales of scales have no such bound.
BOUNDS = {
    "F8_E4M3": "6.25 % of the value (more for values near zero)",
    "F8_E5M2": "12.5 % of the value (more for values near zero)",
    "Q8_0": "0.5 % of the largest value in a block of 32",
    "Q5_0": "6.3 % of the largest value in a block of 32",
    "Q5_1": "1.7 % of the range of a block of 32",
    "Q4_0": "12.5 % of the largest value in a block of 32",
    "Q4_1": "3.4 % of the range of a block of 32",
}


@dataclass(frozen=True)
class Scale:
    """The scales that a packed tensor is multiplied by.

    Attributes:
        file: The file that holds them.
        start: Offset of the first scale; None if only the file's header was downloaded.
        stored: Their dtype in safetensors. "U8" are exponents of two with an offset of 127, which is what F8_E8M0 means.
        shape: Their shape, with one dimension for each dimension of the tensor.
        blocks: For each dimension, how many consecutive rows or columns share a scale. The last block may be incomplete.
        identity: Identity of the file when its header was read.
    """

    file: Path
    start: int | None
    stored: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    identity: FileIdentity | None = None


@dataclass(frozen=True)
class Packing:
    """The way from a tensor's bytes to its numbers.

    Attributes:
        kind: Dtype in safetensors ("F8_E4M3"), or type in a GGUF file ("Q4_K", "F32").
        nbytes: Number of stored bytes, without the scales.
        scale: The scales that 8-bit floats are multiplied by.
        heads: Number of attention heads whose rows are interleaved, as llama.cpp stores them; 0 if no row moves.
        shift: Number that is added to every value.
        reader: Place of the part's class that reads the tensor; empty for `PackedSource`.
        layout: What this class must know, as pairs of a name and plain data.
        beside: Other stored tensors that the numbers are computed from, by their role.
    """

    kind: str
    nbytes: int
    scale: Scale | None = None
    heads: int = 0
    shift: float = 0.0
    reader: str = ""
    layout: tuple[tuple[str, Any], ...] = ()
    beside: tuple[tuple[str, Entry], ...] = ()

    def meaning(self) -> list[Any]:
        """Return what gives the bytes their meaning, as plain data for digests."""
        scale = self.scale
        scales = [scale.stored, list(scale.shape), list(scale.blocks)] if scale else None
        known = [self.reader, self.layout, [[role, one.spec.stored, one.spec.shape] for role, one in self.beside]]
        return [self.kind, self.heads, self.shift, scales, *(known if self.reader else ())]

    def companions(self) -> list[Entry]:
        """Return the other stored tensors that the numbers are computed from."""
        scale = self.scale
        scales = [Entry(scale.file, scale.start, TensorSpec(scale.shape, scale.stored), scale.identity)] if scale else []
        return [*scales, *(entry for _, entry in self.beside)]

    def identity(self) -> list[Any]:
        """Return `meaning` and the identities of the files with the companions, for keys of cached digests."""
        beside = self.companions()
        places = [[str(one.file.resolve()), one.start, one.identity.storable if one.identity else None] for one in beside]
        return [*self.meaning(), *places] if places else [*self.meaning(), None]


# Quantizations that transformers can undo while it loads a model. Of the others, only bitsandbytes can be undone afterwards.
_UNDONE_ON_LOAD = {"mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig", "metal": "MetalConfig"}


def dequantise(method: str | None, path: Path) -> str:
    """Return the hint for an error about a quantized checkpoint.

    Args:
        method: `quant_method` of config.json; None if unknown.
        path: The checkpoint's directory.
    """
    if method in _UNDONE_ON_LOAD:
        kind = _UNDONE_ON_LOAD[method]
        options = f", dtype='bfloat16', quantization_config={kind}(dequantize=True)"
        return f"Dequantize it: {convert_command(path, f', {kind}', options)}  {TOKENIZER_TOO}"
    if method is not None and method.startswith("bitsandbytes"):
        return f"Dequantize it on a machine that can run bitsandbytes: {convert_command(path, then='.dequantize()')}  {TOKENIZER_TOO}"
    if (thing := look(path)) and thing.kind == "mlx":
        return thing.hint
    return (
        "Use the model that it was quantized from (`base_model` in its README). transformers cannot undo this format exactly, "
        "so deltas would be taken from rounded weights."
    )


def refusal(quantization: object, path: Path, label: str) -> WorkbenchError:
    """Return the error for a checkpoint with a `quantization_config` that is not read here."""
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    return WorkbenchError(
        f"{label}: quantized weights ({method}); expected floating point",
        dequantise("bitsandbytes" if "load_in_4bit" in str(quantization) else method, path),
    )


def has_headers_only(path: Path) -> bool:
    """Return whether the safetensors files of a directory have headers but no tensor data."""
    return (path / HEADERS_ONLY).is_file()


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def is_whole(file: Path) -> bool:
    """Return True if a safetensors file of the cache is there and has the bytes that its header describes; else it is made again."""
    try:
        read_header(file, watched=False)
    except (OSError, WorkbenchError):
        return False
    return True


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically and create its directory if necessary."""
    from safetensors.torch import save_file

    # safetensors first writes a file with a random name, which would stay after a kill: in a folder of ours it goes with the next write.
    with atomic_write(path) as temporary, scratch_beside(path) as folder, disk_errors(path):
        save_file(dict(tensors), folder / "tensors", metadata=metadata)
        (folder / "tensors").rename(temporary)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses safetensors as OSError with the path: the library reports it only as text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if match := _OS_ERROR.search(str(error)):
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME = 1000


class HeadersOnlyError(WorkbenchError):
    """The error for reading a tensor of a file of which only the header was downloaded."""


@dataclass(frozen=True)
class Entry:
    """The place of a tensor on disk.

    Attributes:
        file: The tensor's file.
        start: Offset of the tensor's first byte; None if the file has a header only.
        spec: Shape and dtype.
        identity: Identity of the file when its header was read. Readers raise an error if it has changed; None skips that check.
        packing: How the numbers are computed from the stored bytes; None if they are stored as `spec` says.
    """

    file: Path
    start: int | None
    spec: TensorSpec
    identity: FileIdentity | None = field(default=None, compare=False)
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """The number of stored bytes, without those of scales."""
        return self.packing.nbytes if self.packing else self.spec.nbytes

    @property
    def offset(self) -> int:
        """The offset of the tensor's first byte; raises HeadersOnlyError if only the header was downloaded."""
        if self.start is None:
            raise HeadersOnlyError(
                f"{self.file}: only the header was downloaded, not the tensors",
                "`workbench run` and `workbench eval` download the file if the recipe names the model by its hub id.",
            )
        return self.start


def read_header(file: Path, watched: bool = True, packed: bool = False) -> dict[str, Entry]:
    """Read the header of a safetensors file.

    Args:
        file: The file.
        watched: Whether later reads raise an error if the file changes; False for a file that the caller itself writes.
        packed: Accept 8-bit floats. Their entries have the spec of a bfloat16 tensor, and a packing without scales.

    Returns:
        Tensor name -> entry, in the order of their offsets.

    Raises:
        WorkbenchError: If the file is not safetensors, is truncated, has a header over 100 MB, gaps, overlaps or a quantized dtype.
    """
    with file.open("rb") as stream:
        identity = settled_identity(stream.fileno()) if watched else None
        size = identity.size if identity else os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            thing = look(file) if size < 1024 else None
            raise WorkbenchError(
                f"{file}: not a safetensors file (a header of {length:,} bytes in a file of {size:,} bytes)",
                thing.hint if thing and thing.kind == "lfs" else "The download may be incomplete: download the file again.",
            )
        text = stream.read(length)
    hint = "Download the file again."
    where = f"{file}: damaged safetensors header"
    header = jsondoc.as_object(jsondoc.parse(text, where, hint, unique=True), where, hint)
    header.pop("__metadata__", None)
    described = [_parse_entry(file, name, info) for name, info in header.items()]
    entries: dict[str, Entry] = {}
    headers_only = has_headers_only(file.parent)
    expected = 0
    for start, stop, name, dtype, shape in sorted(described):
        if dtype not in DTYPES and not (packed and dtype in PACKED):
            raise WorkbenchError(
                f"{file}: {name} has dtype {dtype}, a quantized or packed format; expected floating point",
                "Save the tensors again in bfloat16." if dtype in PACKED else dequantise(None, file.parent),
            )
        spec = TensorSpec(shape, dtype if dtype in DTYPES else "BF16")
        packing = None if dtype in DTYPES else Packing(dtype, spec.numel)
        entry = Entry(file, None if headers_only else 8 + length + start, spec, identity, packing)
        if start != expected or stop - start != entry.nbytes or min(shape, default=0) < 0:
            raise WorkbenchError(
                f"{file}: {name} has offsets {start}-{stop}, expected {expected}-{expected + entry.nbytes}",
                "The file is damaged: download it again.",
            )
        expected = stop
        entries[name] = entry
    if 8 + length + expected != size:
        raise WorkbenchError(
            f"{file}: the file has {size:,} bytes, but its header describes {8 + length + expected:,} (truncated?)",
            "Download the file again.",
        )
    return entries


def _parse_entry(file: Path, name: str, info: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Return offsets, name, dtype and shape of a header's entry; raise WorkbenchError if it is malformed."""
    if isinstance(info, dict) and len(name) <= MAX_NAME:
        offsets, shape, dtype = _sizes(info.get("data_offsets")), _sizes(info.get("shape")), info.get("dtype")
        if (
            offsets is not None
            and len(offsets) == 2
            and isinstance(dtype, str)
            and shape is not None
            and len(shape) <= MAX_DIMENSIONS
        ):
            return offsets[0], offsets[1], name, dtype, shape
    raise WorkbenchError(
        f"{file}: damaged safetensors header: {name[:80]!r} has no valid dtype, shape and data_offsets",
        "Download the file again.",
    )


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return a value as a tuple if it is a list of whole numbers from 0 to 2⁶³ - 1; None if not."""
    valid = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
    return tuple(value) if valid else None
