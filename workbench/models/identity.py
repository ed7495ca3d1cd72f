"""The identity of a model: what it is, as digests of named parts. Keys of stored results name the parts that the results depend on.

A result may depend on the tensors and config.json (`weights.digests.weights_digest` covers both, the class included), the tokenizer, the
chat template, and the settings of generation_config.json that change texts. What a live model computes also depends on the device and on
the versions of the libraries (`computed_on`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from workbench.ground import jsondoc
from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import bytes_digest, json_digest, read_memo, write_memo
from workbench.ground.identity import WatchedFiles, installed
from workbench.ground.lazy import torch
from workbench.ground.project import remembered
from workbench.models.architecture import text_parts
from workbench.weights.device import prepare


def pick_device(name: str) -> torch.device:
    """Return the device of `--device` and prepare it.

    Args:
        name: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.

    Raises:
        WorkbenchError: If there is no such device, if there are several, or if it is Apple's GPU.
    """
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    if name.partition(":")[0] == "mps":
        raise UsageError(
            f"--device {name}: many steps compute in float64, which Apple's Metal does not have", "Use --device cpu."
        )
    if "," in name:
        raise UsageError(
            f"--device {name}: expected one device, because one run computes on one device",
            f"Use --device {name.partition(',')[0]}, and start other runs on other devices at the same time.",
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise WorkbenchError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", "Use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    prepare(device)
    return device


def has_cuda() -> bool:
    """Return whether torch can compute on a CUDA device. On a machine without a GPU driver, the answer needs no torch."""
    return _has_driver() and torch.cuda.is_available()


def _has_driver() -> bool:
    """Return whether NVIDIA's driver library can be loaded, or AMD's driver is present."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


GENERATION = "generation_config.json"
# transformers' defaults of missing settings; test_decoding compares them with the installed version.
DEFAULTS: Mapping[str, object] = {
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "remove_invalid_values": False, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0,
}  # fmt: skip
# Settings that do not change texts, or that lm-eval passes with every call.
_IDLE = frozenset({
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "max_length", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
})  # fmt: skip
# Settings of older checkpoints, which transformers takes from config.json where there is no generation_config.json.
_LEGACY = (
    *DEFAULTS, "eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id",
    "exponential_decay_length_penalty",
)  # fmt: skip


def generation_settings(folder: Path, config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that change texts, compared with the same weights without a generation_config.json.

    Args:
        folder: Directory with generation_config.json, which may be missing.
        config: The content of config.json, which the digest of the weights covers. Settings equal to it or to transformers' defaults are
            ignored, so that the result is empty for most models.

    Returns:
        Field -> value; None for a field that config.json sets and generation_config.json does not.

    Raises:
        WorkbenchError: If the file is not a JSON object.
    """
    path = folder / GENERATION
    if not path.is_file():
        return {}
    stated = {
        key: value
        for key, value in jsondoc.read_object(path, None, "Download the file again.", infinite=True).items()
        if value is not None and key not in _IDLE
    }
    config_values: dict[str, object] = {}
    for part in reversed(list(text_parts(config))):
        config_values |= {key: value for key, value in part.items() if value is not None}
    from_config = {key: config_values[key] for key in _LEGACY if config_values.get(key) is not None}
    differing = sorted(key for key in {*stated, *from_config} if _value(stated, key) != _value(from_config, key))
    return {key: stated.get(key) for key in differing}


def identity(weights: str, settings: Mapping[str, object], tokenizer: str) -> str:
    """Return the digest of a configuration: the digest of its weights, combined with what else decides its scores.

    Args:
        weights: Digest of the weights.
        settings: Generation settings, usually empty.
        tokenizer: Digest of the tokenizer; empty if only scores are known.
    """
    return json_digest([weights, settings, tokenizer]) if settings or tokenizer else weights


def _value(settings: Mapping[str, object], key: str) -> Any:
    """Return a setting or its default; a list of one value equals the value."""
    value = settings.get(key, DEFAULTS.get(key))
    return value[0] if isinstance(value, list) and len(value) == 1 else value


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of a multimodal model's processor."""
_TEMPLATES = "chat_template"
_OBJECTS = frozenset({"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"})
# Fields of these files that do not change tokens: transformers replaces `padding` and `truncation` in every call, and the others name
# who wrote the file, and where. Templates are a part of their own.
_NOT_TOKENS = frozenset(
    {"padding", "truncation", "name_or_path", "transformers_version", "is_local", "local_files_only", "chat_template"}
)
_CLASS_FROM = ("model_type", "tokenizer_class")  # fields of config.json
_HINT = "Download the tokenizer's files again."
_SMALL = 100_000  # bytes of a file that is parsed each time: parsing 30 MB takes seconds


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return name -> file of a directory's tokenizer and chat templates."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return files | {f"{file.parent.name}/{file.name}": file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}


def shipped_files(tokenizer: Path, processor: Path) -> dict[str, Path]:
    """Return name -> file that a checkpoint gets as it is: tokenizer, chat template, generation settings, processor."""
    others = {GENERATION: tokenizer / GENERATION, **{name: processor / name for name in PROCESSOR_FILES}}
    return tokenizer_files(tokenizer) | {name: file for name, file in others.items() if file.is_file()}


def tokens_digest(folder: Path, watched: WatchedFiles | None = None) -> str | None:
    """Return the digest of everything that turns text into tokens: all files, and what chooses the tokenizer's class.

    transformers chooses the class from tokenizer_config.json and config.json, and some classes replace the normalizer and the
    pre-tokenizer of tokenizer.json, so that equal files of models of different types may give different tokens.

    Returns:
        The digest; None if the directory has no tokenizer.
    """
    files = {name: file for name, file in tokenizer_files(folder).items() if _TEMPLATES not in name}
    if not files:
        return None
    read = watched.read if watched else Path.read_bytes
    parts = [[name, _meaning(file, read(file))] for name, file in files.items()]
    config = jsondoc.optional(folder / "config.json")
    return json_digest([parts, [config.get(key) for key in _CLASS_FROM]])


def _meaning(file: Path, content: bytes) -> str:
    """Return the digest of a file without the fields that do not change tokens."""
    plain = bytes_digest(content)
    if file.name not in _OBJECTS:
        return plain
    place = remembered("tokenizers", json_digest([plain, sorted(_NOT_TOKENS)]))
    if len(content) > _SMALL and (memo := read_memo(place, meaning=str)):
        return str(memo["meaning"])
    fields = jsondoc.as_object(jsondoc.parse(content, str(file), _HINT, infinite=True), str(file), _HINT)
    meaning = json_digest({key: value for key, value in fields.items() if key not in _NOT_TOKENS})
    if len(content) > _SMALL:
        with suppress(OSError):
            write_memo(place, {"meaning": meaning})
    return meaning


def template_digest(folder: Path, watched: WatchedFiles | None = None) -> str | None:
    """Return the digest of a directory's chat templates, wherever they are stored; None if it has none."""
    read = watched.read if watched else Path.read_bytes
    parts = [[name, bytes_digest(read(file))] for name, file in tokenizer_files(folder).items() if _TEMPLATES in name]
    stated = jsondoc.optional(folder / "tokenizer_config.json").get("chat_template")
    return json_digest([*parts, stated]) if parts or stated is not None else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a tokenizer with its chat template: `tokens_digest` and `template_digest`."""
    if not isinstance(tokenizer, (str, Path)):
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return tokenizer_digest(folder)
    tokens = tokens_digest(Path(tokenizer))
    if tokens is None:
        raise WorkbenchError(
            f"no tokenizer found in {tokenizer}", "Copy tokenizer.json and tokenizer_config.json of its base there."
        )
    return json_digest([tokens, template_digest(Path(tokenizer))])


def tokenizer_difference(one: Path, other: Path) -> str:
    """Return in which parts the tokenizers of two directories differ, in words, in the order in which `tokenizer_digest` reads them."""
    parts = ["their chat templates"] if template_digest(one) != template_digest(other) else []
    files = tokenizer_files(one), tokenizer_files(other)
    for name in sorted({*files[0], *files[1]}):
        meanings = {_meaning(found[name], found[name].read_bytes()) if name in found else None for found in files}
        if _TEMPLATES not in name and len(meanings) > 1:
            parts.append(name)
    configs = [jsondoc.optional(folder / "config.json") for folder in (one, other)]
    for key in _CLASS_FROM:
        if (values := [config.get(key) for config in configs])[0] != values[1]:
            parts.append(f"{key} of config.json ({values[0]}, {values[1]}), from which transformers takes the tokenizer's class")
    return " and ".join(parts)


def loaded_tokens_digest(tokenizer: Any) -> str:
    """Return the digest of everything that turns text into tokens, of a tokenizer as transformers has built it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json_digest([type(tokenizer).__name__, backend.to_str()]) if backend else tokenizer_digest(tokenizer)


def vocabulary_digest(path: Path) -> str | None:
    """Return the digest of the vocabulary and merges in tokenizer.json, or None if the file does not exist.

    It tells whether two models number their tokens alike, so that rows of embeddings belong together. It does not tell whether they
    split texts alike: that is `tokens_digest`.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    return json_digest(jsondoc.as_object(jsondoc.parse(file.read_bytes(), str(file)), str(file)).get("model"))


@lru_cache(maxsize=1)
def _libraries() -> Mapping[str, str]:
    return installed("torch", "transformers")


def computed_on(device: torch.device | None = None) -> list[Any]:
    """Return the part of a key that every result of a live model depends on: the type of device, and the versions of the libraries.

    CPU and CUDA differ in the last bits, and so do releases of torch; a release of transformers may change what a model computes.

    Args:
        device: The device; None stands for the one that `--device auto` picks.
    """
    kind = device.type if device is not None else "cuda" if has_cuda() else "cpu"
    return [kind, dict(_libraries())]
