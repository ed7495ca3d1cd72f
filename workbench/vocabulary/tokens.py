"""Token strings and ids of a tokenizer directory, read from its files without building the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.models.tokenizer import load_tokenizer

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

    Args:
        path: The directory.
        label: The model's name in messages.

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
    return Tokens({**ids, **{token: i for token, (i, _) in added.items()}}, {t: _flags(entry) for t, (_, entry) in added.items()})


def reading_bytes(path: Path) -> int:
    """Return the memory that `read_tokens` needs, in bytes: measured 5 to 9 times the size of the file, by its indentation."""
    file = path / "tokenizer.json"
    return 7 * file.stat().st_size if file.is_file() else 0


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}


def _converted(path: Path, label: str) -> Tokens:
    """Read a vocabulary through transformers, which converts files of older formats."""
    tokenizer = checked_tokenizer(path, label)
    added = {t.content: {flag: bool(getattr(t, flag)) for flag in _FLAGS} for t in tokenizer.added_tokens_decoder.values()}
    return Tokens({str(t): int(i) for t, i in tokenizer.get_vocab().items()}, added)


def checked_tokenizer(path: Path, label: str) -> Any:
    """Load the tokenizer of a directory with transformers.

    Args:
        path: The directory.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no tokenizer, or if transformers cannot build it.
    """
    if not has_tokenizer(path):
        raise WorkbenchError(
            f"{label}: no tokenizer in {path}", "Copy the tokenizer's files there (tokenizer.json, tokenizer_config.json)."
        )
    try:
        return load_tokenizer(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise WorkbenchError(
            f"{label}: transformers cannot build the tokenizer in {path} ({type(error).__name__}: {str(error)[:200]})",
            "Save it again as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        ) from None


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


def _count(tokens: dict[str, Any]) -> str:
    return f"{len(tokens):,} token" + ("s" if len(tokens) != 1 else "")


def _list_examples(examples: Iterable[str], total: int) -> str:
    examples = list(examples)
    return ", ".join(examples) + (", …" if total > len(examples) else "")
