"""GGUF files as models: a directory in the project's cache stands for the file, see `weights/packed.py`.

Configuration and tokenizer are those that transformers reads from the file; the configuration is completed and checked. Tensors get their
names in transformers, and what llama.cpp's converter did to them is undone when they are read. Architectures whose conversion was not
compared, and fields that transformers does not read, are refused, because a wrong guess would give another model without an error.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest, json_digest, publish_once, scratch_beside, write_json
from workbench.ground.foreign_names import GGUF, TOKENIZER_TOO, convert_command
from workbench.ground.identity import installed, settled
from workbench.ground.manifest import has_its_files, seal
from workbench.ground.project import cache_of
from workbench.models.architecture import model_depth
from workbench.models.identity import tokenizer_files
from workbench.models.skeleton import skeleton
from workbench.weights.header import DEPTHS, MAX_SIZE, check_config
from workbench.weights.packed import LINK, RECORD

if TYPE_CHECKING:
    from gguf import GGUFReader


# Fields of an architecture that transformers reads, that are read here, or that say nothing about what the model computes.
_READ = frozenset({
    "context_length", "block_count", "feed_forward_length", "embedding_length", "rope.dimension_count", "rope.freq_base",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "vocab_size",
    "attention.key_length", "attention.value_length", "attn_logit_softcapping", "final_logit_softcapping",
})  # fmt: skip
_SLIDING = {"gemma2", "gemma3"}
_LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B models, whose attention is scaled by the width of a head's share
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_settings(
    file: Path, architecture: str, fields: Mapping[str, object], tensors: Sequence[Any], label: str, hint: str
) -> dict[str, object]:
    """Return config.json of the model in a GGUF file.

    transformers reads sizes, rotary base and ties. Sizes of heads, caps of logits, the scale of Gemma's attention and the rotary
    scaling of Llama 3 are read here, because transformers takes defaults for them.

    Raises:
        WorkbenchError: If the file has fields that are not read, or if transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    own = {name.removeprefix(f"{architecture}."): v for name, v in fields.items() if name.startswith(f"{architecture}.")}
    unread = [name for name in own if name not in _READ and not _is_harmless(name, own[name], architecture)]
    if unread:
        raise WorkbenchError(
            f"{label}: the field {architecture}.{unread[0]} = {str(own[unread[0]])[:40]} is not read from GGUF files"
            + (f" ({len(unread)} such fields)" if len(unread) > 1 else ""),
            hint,
        )
    try:
        parsed = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, ArithmeticError, AttributeError, IndexError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WorkbenchError(f"{label}: transformers cannot read its configuration ({reason})", hint) from None
    config: dict[str, Any] = json.loads(parsed.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)].__name__]
    check_config(config, label)
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", DEPTHS[0], "intermediate_size", "vocab_size"):
        if type(config.get(name)) is not int or not 0 < config[name] <= MAX_SIZE:
            raise WorkbenchError(f"{label}: {name} is {str(config.get(name))[:40]}; expected a positive whole number", hint)
    # transformers takes one size for all heads.
    size = own.get("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, size) != size:
            raise WorkbenchError(f"{label}: {architecture}.{name} is {own[name]}, but a head has {size} rows", hint)
    config["head_dim"] = size
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if architecture == "gemma2" and name in own:
            config[name] = own[name]
    if architecture in _LARGE:
        large = model_depth(config) == _LARGE[architecture]
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if large else size
    factors = next((tensor for tensor in tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        config["rope_parameters"] = {
            **(config.get("rope_parameters") or {}),
            **_llama3_rope([float(value) for value in factors.data], config, label, hint),
        }
    return config


def _is_harmless(name: str, value: Any, architecture: str) -> bool:
    """Return whether a field says what is the case without it."""
    if name == "attention.sliding_window":
        return architecture in _SLIDING
    return (name == "rope.scaling.type" and value in ("none", "")) or (name == "expert_count" and value == 0)


def _llama3_rope(factors: list[float], config: Mapping[str, Any], label: str, hint: str) -> dict[str, object]:
    """Return the rotary settings of Llama 3.1 and later whose factors a file stores.

    llama.cpp stores what each frequency is divided by. transformers computes it from four numbers, of which files by Meta only vary
    `factor`; the last factor is that number. Source: transformers, modeling_rope_utils._compute_llama3_parameters.
    """
    theta, size = float((config.get("rope_parameters") or config)["rope_theta"]), int(config["head_dim"])
    factor = factors[-1] if factors else 0.0
    if (
        len(factors) != size // 2
        or factor <= 0
        or not all(
            math.isclose(stored, _divisor(theta ** (2 * i / size), factor), rel_tol=1e-3) for i, stored in enumerate(factors)
        )
    ):
        raise WorkbenchError(f"{label}: rope_freqs.weight does not hold the rotary scaling of Llama 3", hint)
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _divisor(length: float, factor: float) -> float:
    """Return what Llama 3 divides a frequency by whose wave has the given length over 2π."""
    low, high, context = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], _LLAMA3["original_max_position_embeddings"]
    wave = 2 * math.pi * length
    if wave < context / high:
        return 1.0
    if wave > context / low:
        return factor
    smooth = (context / wave - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


_VERSION = 1  # raise it when the record or the configuration of a file changes
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_PLAIN = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Family:
    """An architecture as llama.cpp's converter writes it.

    Attributes:
        interleaved: True if the rows of query and key projections are interleaved within each head.
        shift: Number to add to the weights of norms.
    """

    interleaved: bool = False
    shift: float = 0.0


# Architecture in the file -> what the converter does to its tensors. Source: llama.cpp, convert_hf_to_gguf.py, as undone by
# transformers/modeling_gguf_pytorch_utils.py; tests/bricks/test_gguf_files.py compares each.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(interleaved=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(shift=-1.0),
    "gemma3": Family(shift=-1.0),
}


def find_gguf(path: Path, what: str) -> Path | None:
    """Return the GGUF file that a path means: the file itself, or the only one in a directory without other weights.

    Raises:
        WorkbenchError: If a directory has several GGUF files and no other weights.
    """
    if path.is_file():
        return path if path.suffix == GGUF else None
    files = sorted(path.glob(f"*{GGUF}"))
    if not files or (path / RECORD).is_file() or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise WorkbenchError(
            f"{what}: {path} has {len(files)} GGUF files ({', '.join(f.name for f in files[:3])}{' …' if len(files) > 3 else ''})",
            f"Name one of them, such as {files[0]}.",
        )
    return files[0]


def gguf_folder(file: Path, project: Path, what: str) -> Path:
    """Return the directory that stands for a GGUF file, making it if it does not exist or the file has changed.

    Raises:
        WorkbenchError: If the file is damaged or split, or if its architecture, fields or tensors are not read here.
    """
    file = file.resolve()
    identity = settled(file)
    content = identity.storable if identity.is_telling else file_digest(file)
    beside = {name: file_digest(path) for name, path in tokenizer_files(file.parent).items()}  # see `_save_tokenizer`
    key = json_digest([_VERSION, str(file), content, beside, installed("transformers", "gguf")])[:12]
    place = cache_of(project) / "gguf" / f"{file.stem}-{key}"
    if (place / LINK).is_symlink() and has_its_files(place):
        return place
    shutil.rmtree(place, ignore_errors=True)  # it is damaged
    with scratch_beside(place) as folder:
        partial = folder / "model"
        partial.mkdir()
        (partial / LINK).symlink_to(file)
        _fill(partial, file, identity.storable, f"{what}: {file}")
        seal(partial, open=[LINK])  # of the file itself, header and tensors are checked where they are read
        publish_once(partial, place)
    return place


def _fill(folder: Path, file: Path, identity: list[int], label: str) -> None:
    """Write configuration, tokenizer and record of a file into a new directory."""
    if _SPLIT.search(file.name):
        raise WorkbenchError(f"{label} is one part of a split file", "Join the parts: llama-gguf-split --merge FIRST OUT.gguf")
    reader, fields = _open(file, label)
    architecture = str(fields.get("general.architecture"))
    family = FAMILIES.get(architecture)
    if family is None:
        raise WorkbenchError(
            f"{label}: the architecture {architecture!r} is not read from GGUF files, only {', '.join(FAMILIES)}", _convert(file)
        )
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    config = read_settings(file, architecture, fields, reader.tensors, label, _convert(file))
    stored = _stored({tensor.tensor_type.name for tensor in reader.tensors})
    config["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    names = _names(config, architecture, shapes, label, _convert(file))
    tensors = {name: _row(reader, gguf, name, config, family) for gguf, name in names.items()}
    if "tokenizer.ggml.model" in reader.fields:
        _save_tokenizer(folder, file, label)
    write_json(folder / RECORD, {"version": _VERSION, "identity": identity, "stored": stored, "tensors": tensors})


def _open(file: Path, label: str) -> tuple[GGUFReader, dict[str, object]]:
    """Open a GGUF file and read its fields, except those of the tokenizer; raise WorkbenchError if the file is damaged."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        return reader, {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WorkbenchError(f"{label}: not a complete GGUF file ({reason})", "Download the file again.") from None


def _stored(kinds: set[str]) -> str:
    """Return the dtype that a model is read as: the one of its plain matrices, or bfloat16 if there are quantized ones."""
    if not kinds <= _PLAIN or "BF16" in kinds:
        return "BF16"
    return "F16" if "F16" in kinds else "F32"


def _names(
    config: Mapping[str, object], architecture: str, shapes: Mapping[str, tuple[int, ...]], label: str, hint: str
) -> dict[str, str]:
    """Return the name in transformers of every tensor in a file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(number, model_depth(config))
    model = skeleton(json.dumps(config, sort_keys=True))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        wanted = {name: shape for name, shape in wanted.items() if name not in model.all_tied_weights_keys}
    names = {}
    for name in wanted:
        stem, _, suffix = name.rpartition(".")
        found = known.get_name(stem)
        if found is not None:
            names[f"{found}.{suffix}"] = name
    stored = {live for gguf, live in names.items() if gguf in shapes}
    missing = [name for name in wanted if name not in stored]
    extra = [gguf for gguf in shapes if gguf not in names and gguf != "rope_freqs.weight"]
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has {', '.join(extra[:3])}, which has no name in transformers"] if extra else []
        raise WorkbenchError(f"{label}: the file {' and '.join(parts)}", hint)
    for gguf, name in names.items():
        if shapes[gguf] != wanted[name]:
            raise WorkbenchError(
                f"{label}: {gguf} is {list(shapes[gguf])}, but {name} of a model with the file's settings is {list(wanted[name])}",
                hint,
            )
    return names


def _row(reader: GGUFReader, gguf: str, name: str, config: Mapping[str, Any], family: Family) -> dict[str, object]:
    """Return the record of one tensor: where it lies, and how it is read."""
    tensor = next(tensor for tensor in reader.tensors if tensor.name == gguf)
    shape = [int(n) for n in reversed(tensor.shape)]
    row: dict[str, object] = {
        "kind": tensor.tensor_type.name,
        "shape": shape,
        "start": int(tensor.data_offset),
        "nbytes": int(tensor.n_bytes),
    }
    heads = int(config["num_attention_heads"])
    if family.interleaved and re.search(r"\.attn_[qk]\.", gguf):
        row["heads"] = heads if ".attn_q." in gguf else int(config.get("num_key_value_heads") or heads)
    if family.shift and name.endswith("norm.weight"):
        row["shift"] = family.shift
    return row


def _save_tokenizer(folder: Path, file: Path, label: str) -> None:
    """Write the tokenizer of a file, or the one that lies beside the file if transformers cannot read that in it."""
    from workbench.models.prompts import load_tokenizer

    try:
        load_tokenizer(file.parent, gguf_file=file.name).save_pretrained(folder)
        return
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises plain Exception)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if not (file.parent / "tokenizer.json").is_file():
        raise WorkbenchError(
            f"{label}: transformers cannot read the tokenizer in the file ({reason})",
            f"Put tokenizer.json and tokenizer_config.json of the original model into {file.parent}.",
        )
    load_tokenizer(file.parent).save_pretrained(folder)


def _convert(file: Path) -> str:
    """Return the hint for a file that is not read here."""
    options = f", gguf_file={file.name!r}, quantization_config=GgufConfig(dequantize=True)"
    return f"Dequantize it with transformers, and compare the result: {convert_command(file.parent, ', GgufConfig', options)}  {TOKENIZER_TOO}"
