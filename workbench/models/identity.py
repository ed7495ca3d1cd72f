"""The identity of a model: what it is, as digests of named parts. Keys of stored results name the parts that the results depend on.

A result may depend on the tensors and config.json (`weights.digests.weights_digest` covers both, the class included), the tokenizer, the
chat template, and the generation settings (`models.generation`). What a live model computes also depends on the device and on the
versions of the libraries (`computed_on`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.files import bytes_digest, json_digest
from workbench.identity import WatchedFiles, installed
from workbench.models.device import has_cuda
from workbench.models.generation import FILE as GENERATION

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of a multimodal model's processor."""
_TEMPLATES = "chat_template"
_OBJECTS = frozenset({"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"})
# Fields of these files that do not change tokens: transformers replaces `padding` and `truncation` in every call, and the others name
# who wrote the file, and where. Templates are a part of their own.
_NOT_TOKENS = frozenset(
    {"padding", "truncation", "name_or_path", "transformers_version", "is_local", "local_files_only", "chat_template"}
)
_HINT = "Download the tokenizer's files again."
# Digest of a file's bytes -> digest of its meaning: a tokenizer.json of 30 MB is parsed once a process, however often it is asked for.
_MEANINGS: dict[str, str] = {}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return name -> file of a directory's tokenizer and chat templates."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return files | {f"{file.parent.name}/{file.name}": file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}


def shipped_files(tokenizer: Path, processor: Path) -> dict[str, Path]:
    """Return name -> file that a checkpoint gets as it is: tokenizer, chat template, generation settings, processor.

    Args:
        tokenizer: Directory of the tokenizer and generation_config.json.
        processor: Directory of the image and audio processor.
    """
    beside = {GENERATION: tokenizer / GENERATION, **{name: processor / name for name in PROCESSOR_FILES}}
    return tokenizer_files(tokenizer) | {name: file for name, file in beside.items() if file.is_file()}


def tokens_digest(folder: Path, watched: WatchedFiles | None = None) -> str | None:
    """Return the digest of everything that turns text into tokens: all files, and what chooses the tokenizer's class.

    transformers chooses the class from tokenizer_config.json and config.json, and some classes replace the normalizer and the
    pre-tokenizer of tokenizer.json, so that equal files of models of different types may give different tokens.

    Args:
        folder: Directory of the tokenizer.
        watched: Record of the files read, which detects later changes.

    Returns:
        The digest; None if the directory has no tokenizer.

    Raises:
        WorkbenchError: If a file is not JSON.
    """
    files = {name: file for name, file in tokenizer_files(folder).items() if _TEMPLATES not in name}
    if not files:
        return None
    read = watched.read if watched else Path.read_bytes
    parts = [[name, _meaning(file, read(file))] for name, file in files.items()]
    config = jsondoc.optional(folder / "config.json")
    return json_digest([parts, [config.get(key) for key in ("model_type", "tokenizer_class")]])


def _meaning(file: Path, content: bytes) -> str:
    """Return the digest of a file without the fields that do not change tokens."""
    plain = bytes_digest(content)
    if file.name not in _OBJECTS:
        return plain
    if plain not in _MEANINGS:
        fields = jsondoc.as_object(jsondoc.parse(content, str(file), _HINT, infinite=True), str(file), _HINT)
        _MEANINGS[plain] = json_digest({key: value for key, value in fields.items() if key not in _NOT_TOKENS})
    return _MEANINGS[plain]


def template_digest(folder: Path, watched: WatchedFiles | None = None) -> str | None:
    """Return the digest of a directory's chat templates, wherever they are stored; None if it has none.

    Args:
        folder: Directory of the tokenizer.
        watched: Record of the files read, which detects later changes.
    """
    read = watched.read if watched else Path.read_bytes
    parts = [[name, bytes_digest(read(file))] for name, file in tokenizer_files(folder).items() if _TEMPLATES in name]
    stated = jsondoc.optional(folder / "tokenizer_config.json").get("chat_template")
    return json_digest([*parts, stated]) if parts or stated is not None else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a tokenizer with its chat template: `tokens_digest` and `template_digest`.

    Args:
        tokenizer: A tokenizer's directory, or a tokenizer object.

    Raises:
        WorkbenchError: If the directory has no tokenizer.
    """
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


def loaded_tokens_digest(tokenizer: Any) -> str:
    """Return the digest of everything that turns text into tokens, of a tokenizer as transformers has built it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json_digest([type(tokenizer).__name__, backend.to_str()]) if backend else tokenizer_digest(tokenizer)


def vocabulary_digest(path: Path) -> str | None:
    """Return the digest of the vocabulary and merges in tokenizer.json, or None if the file does not exist.

    It tells whether two models number their tokens alike, so that rows of embeddings belong together. It does not tell whether they
    split texts alike: that is `tokens_digest`.

    Args:
        path: Directory of the tokenizer.
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
