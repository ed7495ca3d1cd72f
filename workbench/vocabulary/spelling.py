"""The text that a token stands for, as bytes, so that tokens of tokenizers with other conventions can be compared.

Byte-level tokenizers write " the" as "Ġthe", SentencePiece writes it as "▁the", and WordPiece as "the" (and "the" as "##the").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.vocabulary.tokens import Tokens, checked_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spellings(path: Path, tokens: Tokens, label: str) -> dict[str, bytes]:
    """Return the bytes that each token stands for. Added tokens, such as special ones, have no spelling.

    Args:
        path: Directory of the tokenizer.
        tokens: Its tokens.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no tokenizer, or its file is invalid.
    """
    file = path / "tokenizer.json"
    if file.is_file():
        data = jsondoc.read_object(file, f"{label}: {file}", "Download the file again.")
    else:
        data = json.loads(checked_tokenizer(path, label).backend_tokenizer.to_str())
    spell = _speller(data)
    return {token: text for token in tokens.ids if token not in tokens.added and (text := spell(token)) is not None}


def _speller(data: Mapping[str, Any]) -> Any:
    """Return a function that gives a token's bytes, by the conventions of a tokenizer.json; None for one that it cannot spell."""
    kinds = set(_kinds([data.get("pre_tokenizer"), data.get("decoder")]))
    model = data.get("model") or {}
    if "ByteLevel" in kinds:
        return _byte_level
    if model.get("type") == "WordPiece" or "WordPiece" in kinds:
        prefix = str(model.get("continuing_subword_prefix") or "##")
        return lambda token: (token.removeprefix(prefix) if token.startswith(prefix) else " " + token).encode()
    return _sentence_piece


def _kinds(nodes: Any) -> Iterator[str]:
    """Yield the types of all parts of a pre-tokenizer or decoder."""
    if isinstance(nodes, Mapping):
        yield str(nodes.get("type"))
        nodes = list(nodes.values())
    if isinstance(nodes, list):
        for node in nodes:
            yield from _kinds(node)


def _byte_level(token: str) -> bytes | None:
    """Return the bytes of a token in which every byte is written as a character of its own; None if it is not such a token."""
    found = [_BYTES.get(character) for character in token]
    return bytes(byte for byte in found if byte is not None) if None not in found else None


def _sentence_piece(token: str) -> bytes:
    """Return the bytes of a token that writes a space as "▁", and a byte without a token as "<0x0A>"."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _characters() -> dict[str, int]:
    """Return the byte of each character of byte-level tokens: printable ones stand for themselves, others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _characters()
