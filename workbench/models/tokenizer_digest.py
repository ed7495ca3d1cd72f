"""Digest of a tokenizer: tokenizers with equal digests give equal tokens and equal chat prompts."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.files import bytes_digest

_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_NOT_TOKENS = (
    "padding",
    "truncation",
    "name_or_path",
    "transformers_version",
    "tokenizer_class",
    "is_local",
    "backend",
    "local_files_only",
)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a tokenizer's vocabulary, settings and chat template.

    Fields that do not change tokens are ignored: names, versions, and the padding and truncation that a caller last used.

    Args:
        tokenizer: A tokenizer's directory, or a tokenizer object.

    Raises:
        WorkbenchError: If the directory has no tokenizer.
    """
    if not isinstance(tokenizer, (str, Path)):
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return tokenizer_digest(folder)
    parts: list[Any] = []
    for path in sorted([*Path(tokenizer).glob("*"), *Path(tokenizer).glob("additional_chat_templates/*.jinja")]):
        if path.name in _TOKENIZER_JSON:
            content = jsondoc.read_object(path, None, "Download the tokenizer's files again.", infinite=True)
            parts.append([path.name, {key: value for key, value in content.items() if key not in _NOT_TOKENS}])
        elif path.name in ("merges.txt", "tokenizer.model") or path.suffix == ".jinja":
            parts.append([path.name, bytes_digest(path.read_bytes())])
    if not parts:
        raise WorkbenchError(
            f"no tokenizer found in {tokenizer}", "Copy tokenizer.json and tokenizer_config.json of its base there."
        )
    return bytes_digest(json.dumps(parts, sort_keys=True).encode())
