"""Tokenizers as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory, without running code from it and without the network.

    Args:
        path: Directory with the tokenizer's files.
        gguf_file: Name of a GGUF file in it, if the tokenizer is stored there.
    """
    from transformers import AutoTokenizer

    source = {"gguf_file": gguf_file} if gguf_file else {}
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False, **source
    )
    return loaded
