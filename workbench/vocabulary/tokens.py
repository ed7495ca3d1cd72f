"""Tokens of a tokenizer directory, read from its files without building the tokenizer; the text that each stands for; checks of bricks.

Byte-level tokenizers write " the" as "Ġthe", SentencePiece writes it as "▁the", and WordPiece as "the" (and "the" as "##the"). Tokens of
tokenizers with different conventions are compared by their bytes. Without a `tokenizer` block, bricks must have the base's vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.models.architecture import vocabulary_tensors
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import TensorSpec

_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Tokens:
    """A vocabulary.

    Attributes:
        ids: Token -> id, including added tokens.
        added: Added token -> its flags, as in `tokenizers.AddedToken`.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, bool]]

    def below(self, rows: int) -> dict[str, int]:
        """Return the tokens with an id below the number of rows of an embedding."""
        return self.ids if max(self.ids.values(), default=0) < rows else {t: i for t, i in self.ids.items() if i < rows}


def has_tokenizer(path: Path) -> bool:
    """Return whether a directory has a vocabulary file."""
    return (path / "tokenizer.json").is_file() or any((path / name).is_file() for name in _SLOW)


def read_tokens(path: Path, label: str) -> Tokens:
    """Read the vocabulary of a directory from tokenizer.json, or from older files through transformers; no code from it is run.

    Raises:
        WorkbenchError: If there is no tokenizer, or if its file is invalid.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return _converted(path, label)
    try:
        data = jsondoc.read_object(file, f"{label}: {file}", "Download the file again.")
        vocabulary = data["model"]["vocab"]
        # A Unigram vocabulary is a list of (token, score).
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], i) for i, entry in enumerate(vocabulary))
        ids = {str(token): int(i) for token, i in pairs}
        added = {str(entry["content"]): (int(entry["id"]), entry) for entry in data.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise WorkbenchError(f"{label}: {file} is not a tokenizer (no model.vocab)", "Download the file again.") from None
    # transformers also adds tokens that only tokenizer_config.json names.
    used_ids = {*ids.values(), *(i for i, _ in added.values())}
    config = jsondoc.optional(path / "tokenizer_config.json", label)
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        token = str(entry["content"])
        if token not in ids and token not in added and int(number) not in used_ids:
            added[token] = (int(number), entry)
    flags = {token: {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry} for token, (_, entry) in added.items()}
    return Tokens({**ids, **{token: i for token, (i, _) in added.items()}}, flags)


def reading_bytes(path: Path) -> int:
    """Return the memory that `read_tokens` needs, in bytes: measured 5 to 9 times the size of the file, by its indentation."""
    file = path / "tokenizer.json"
    return 7 * file.stat().st_size if file.is_file() else 0


def _converted(path: Path, label: str) -> Tokens:
    """Read a vocabulary through transformers, which converts files of older formats."""
    tokenizer = checked_tokenizer(path, label)
    added = {t.content: {flag: bool(getattr(t, flag)) for flag in _FLAGS} for t in tokenizer.added_tokens_decoder.values()}
    return Tokens({str(t): int(i) for t, i in tokenizer.get_vocab().items()}, added)


def checked_tokenizer(path: Path, label: str) -> Any:
    """Load the tokenizer of a directory with transformers.

    Raises:
        WorkbenchError: If there is no tokenizer, or if transformers cannot build it.
    """
    if not has_tokenizer(path):
        raise WorkbenchError(
            f"{label}: no tokenizer in {path}", "Copy the tokenizer's files there (tokenizer.json, tokenizer_config.json)."
        )
    from workbench.models.prompts import load_tokenizer

    return load_tokenizer(path, label=label)


def same_file(first: Path, second: Path) -> bool:
    """Return whether two directories have the same tokenizer.json and the same additional tokens in tokenizer_config.json."""
    files = [(d / "tokenizer.json", d / "tokenizer_config.json") for d in (first, second)]
    if not all(file.is_file() for file, _ in files) or files[0][0].read_bytes() != files[1][0].read_bytes():
        return False
    decoders = [jsondoc.optional(config).get("added_tokens_decoder") for _, config in files]
    return decoders[0] == decoders[1] or None in decoders


@dataclass(frozen=True)
class TokenDifference:
    """The difference between a brick's vocabulary and the base's.

    Attributes:
        moved: Token -> (id in the brick, id in the base), for tokens with different ids.
        extra: Tokens that the base lacks.
        lacking: Tokens that the brick lacks.
    """

    moved: dict[str, tuple[int, int]]
    extra: dict[str, int]
    lacking: dict[str, int]

    @classmethod
    def between(cls, brick: dict[str, int], base: dict[str, int]) -> TokenDifference:
        """Compare two vocabularies."""
        moved = {t: (i, base[t]) for t, i in brick.items() if base.get(t, i) != i}
        extra = {t: i for t, i in brick.items() if t not in base}
        return cls(moved, extra, {t: i for t, i in base.items() if t not in brick})

    def __bool__(self) -> bool:
        return bool(self.moved or self.extra or self.lacking)

    def __str__(self) -> str:
        parts = []
        if self.moved:
            examples = [f"{t!r} is {i}, in the base {j}" for t, (i, j) in sorted(self.moved.items(), key=lambda m: m[1])[:3]]
            parts.append(f"{_count(self.moved)} at other ids ({_list_examples(examples, len(self.moved))})")
        for tokens, text in ((self.extra, "that the base lacks"), (self.lacking, "of the base missing")):
            if tokens:
                examples = [f"{t!r} {i}" for t, i in sorted(tokens.items(), key=lambda m: m[1])[:3]]
                parts.append(f"{_count(tokens)} {text} ({_list_examples(examples, len(tokens))})")
        return "; ".join(parts)


def _count(tokens: Mapping[str, object]) -> str:
    return f"{len(tokens):,} token" + ("s" if len(tokens) != 1 else "")


def _list_examples(examples: Iterable[str], total: int) -> str:
    examples = list(examples)
    return ", ".join(examples) + (", …" if total > len(examples) else "")


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spelling(path: Path, label: str) -> Callable[[str], bytes | None]:
    """Return the function that gives the bytes of an ordinary token; None for one that it cannot spell.

    Tokenizers of one convention have the same function, so that the functions can be compared.

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
    """Return a text as a tokenizer's model reads it, inside a text; None if the text is not whole characters."""
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


_BLOCK = (
    "Add `tokenizer: {source: union}` (the tokens of the base and the bricks), `{source: base}` or `{source: BRICK}` to the recipe: "
    "rows are then aligned by token."
)


def check_same_vocabulary(
    name: str, path: Path, specs: Mapping[str, TensorSpec], base_path: Path, base_specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Check that the rows of a checkpoint brick and of the base belong to the same tokens.

    Returns:
        Warnings about tokens that only one of them has.

    Raises:
        WorkbenchError: If their numbers of rows differ, or if a token has different ids.
    """
    tensor = next(iter(_vocabulary_tensors(base_specs)), "")
    if tensor not in specs:
        return []  # another check reports missing tensors
    rows, base_rows = specs[tensor].shape[0], base_specs[tensor].shape[0]
    difference = _difference(path, base_path, f"brick '{name}'")
    text = f"brick '{name}': its vocabulary differs from the base's: "
    if rows != base_rows:
        raise WorkbenchError(
            f"{text}{tensor} has {rows:,} rows{_count_text(path)}, the base's {base_rows:,}{_count_text(base_path)}"
            + (f"; {difference or 'the tokens are the same, the other rows are padding'}" if difference is not None else ""),
            _BLOCK,
        )
    if difference is None or not difference:
        return []
    if difference.moved:
        raise WorkbenchError(f"{text}{rows:,} rows each, but {difference}", _BLOCK)
    return [f"{text}{difference}; the base's tokenizer is written. {_BLOCK}"]


def added_tokens(name: str, path: Path, specs: Mapping[str, TensorSpec], base: Checkpoint, padding: bool = False) -> str | None:
    """Return a warning about the tokens that a brick adds to the base's, each with a row.

    It is empty if both have as many rows, unless tokens may also take rows of `padding`, and None if they differ otherwise.
    """
    tensor = next(iter(_vocabulary_tensors(base.specs)), "")
    if tensor not in specs or (specs[tensor].shape[0] == base.specs[tensor].shape[0] and not padding):
        return ""
    difference, rows = _difference(path, base.path, f"brick '{name}'"), specs[tensor].shape[0]
    if not difference or difference.moved or difference.lacking or max(difference.extra.values()) >= rows:
        return None
    return (
        f"brick '{name}' has {difference}: their rows are kept, as `tokenizer: {{source: union}}` says. "
        f"`tokenizer: {{source: {name}}}` takes its chat template, too"
    )


def check_adapter_vocabulary(
    name: str, path: Path, places: Collection[str], base_path: Path, base_specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Compare the tokenizer in an adapter's directory, if there is one, with the base's.

    Returns:
        Warnings about the differences.

    Raises:
        WorkbenchError: If a token has different ids and the adapter updates vocabulary rows.
    """
    difference = _difference(path, base_path, f"brick '{name}'")
    if difference is None or not difference:
        return []
    text = f"brick '{name}': the tokenizer in its directory differs from the base's: {difference}"
    if difference.moved and any(tensor in places for tensor in _vocabulary_tensors(base_specs)):
        raise WorkbenchError(
            text,
            "The adapter updates rows of another vocabulary: bake it into a checkpoint of the model that it was trained on, then use "
            f"`checkpoint:` with `tokenizer: {{source: {name}}}`.",
        )
    return [f"{text}; the base's tokenizer is written (`tokenizer: {{source: {name}}}` writes the adapter's)"]


def _vocabulary_tensors(specs: Mapping[str, TensorSpec]) -> list[str]:
    try:
        return vocabulary_tensors(specs)
    except WorkbenchError:
        return []


def _difference(path: Path, base_path: Path, label: str) -> TokenDifference | None:
    """Return the difference between two directories' vocabularies; None if one has no tokenizer."""
    if not (has_tokenizer(path) and has_tokenizer(base_path)):
        return None
    if same_file(path, base_path):  # large vocabularies take more memory than a merge
        return TokenDifference({}, {}, {})
    return TokenDifference.between(read_tokens(path, label).ids, read_tokens(base_path, "base").ids)


def _count_text(path: Path) -> str:
    return f" for {len(read_tokens(path, str(path)).ids):,} tokens" if has_tokenizer(path) else ""
