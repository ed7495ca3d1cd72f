"""The text that a token stands for, as bytes, so that tokens of tokenizers with other conventions can be compared.

Byte-level tokenizers write " the" as "Ġthe", SentencePiece writes it as "▁the", and WordPiece as "the" (and "the" as "##the").
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.vocabulary.tokens import Tokens, checked_tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spelling(path: Path, label: str) -> Callable[[str], bytes | None]:
    """Return the function that gives the bytes of an ordinary token; None for one that it cannot spell.

    Tokenizers of one convention have the same function, so that the functions can be compared.

    Args:
        path: Directory of the tokenizer.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no tokenizer, or its file is invalid.
    """
    file = path / "tokenizer.json"
    if file.is_file():
        data = jsondoc.read_object(file, f"{label}: {file}", "Download the file again.")
    else:
        data = json.loads(checked_tokenizer(path, label).backend_tokenizer.to_str())
    kinds = set(_kinds([data.get("pre_tokenizer"), data.get("decoder")]))
    if "ByteLevel" in kinds:
        return _byte_level
    return _word_piece if (data.get("model") or {}).get("type") == "WordPiece" else _sentence_piece


def respelled(spell: Callable[[str], bytes | None], text: bytes) -> str | None:
    """Return a text as a tokenizer's model reads it, inside a text; None if the text is not whole characters.

    Args:
        spell: The tokenizer's convention, as returned by `spelling`.
        text: Bytes of the text.
    """
    if spell is _byte_level:
        return "".join(_CHARACTERS[byte] for byte in text)
    try:
        written = text.decode()
    except UnicodeDecodeError:
        return None
    return written.removeprefix(" ") if spell is _word_piece else written.replace(" ", "\u2581")


def shared_rows(
    tokens: Tokens, spell: Callable[[str], bytes | None], others: Tokens, spell_others: Callable[[str], bytes | None]
) -> dict[str, int]:
    """Return another tokenizer's tokens that a tokenizer has as well -> the id there.

    Tokens of one convention are the same if their strings are. Otherwise ordinary tokens are the same if they stand for the same text: the
    same string may then stand for other texts. Added tokens, such as special ones, are compared by their strings.

    Args:
        tokens: The tokenizer's tokens.
        spell: Its convention, as returned by `spelling`.
        others: The other tokenizer's tokens.
        spell_others: Its convention.
    """
    if spell is spell_others:
        return {token: tokens.ids[token] for token in others.ids if token in tokens.ids}
    # Of several tokens with one text, such as a letter and its byte, the last one is the ordinary one: bytes come first.
    by_text = {text: i for token, i in tokens.ids.items() if token not in tokens.added and (text := spell(token)) is not None}
    rows = {token: tokens.ids[token] for token in others.added if token in tokens.added}
    for token in others.ids:
        if token not in others.added and (text := spell_others(token)) in by_text:
            rows[token] = by_text[text]
    return rows


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


def _word_piece(token: str) -> bytes:
    """Return the bytes of a token that begins a word unless it starts with "##"."""
    return (token.removeprefix("##") if token.startswith("##") else " " + token).encode()


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
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
