"""What a tokenizer directory holds: token strings with their ids, read from its files without building the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError
from workbench.models.tokenizer import load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
         "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json")  # fmt: skip
_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Tokens:
    """A vocabulary.

    Attributes:
        ids: Token -> id, added tokens included.
        added: Added token -> its flags, as `tokenizers.AddedToken` takes them.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, bool]]

    def below(self, rows: int) -> dict[str, int]:
        """The tokens that an embedding of so many rows has a row for."""
        return self.ids if max(self.ids.values(), default=0) < rows else {t: i for t, i in self.ids.items() if i < rows}


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a vocabulary."""
    return (path / "tokenizer.json").is_file() or any((path / name).is_file() for name in _SLOW)


def read_tokens(path: Path, label: str) -> Tokens:
    """The vocabulary of a directory: of tokenizer.json, or of older files by way of transformers.

    Errors: no tokenizer there, a file that is not one. No code of the directory is executed.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return _converted(path, label)
    try:
        data = jsondoc.read_object(file, f"{label}: {file}", "Fetch the file again.")
        vocabulary = data["model"]["vocab"]
        # Unigram keeps a list of (token, score).
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], i) for i, entry in enumerate(vocabulary))
        ids = {str(token): int(i) for token, i in pairs}
        added = {str(entry["content"]): (int(entry["id"]), entry) for entry in data.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise WorkbenchError(f"{label}: {file} is not a tokenizer (no model.vocab)", "Fetch the file again.") from None
    # transformers adds what the configuration names beyond the file.
    taken = {*ids.values(), *(i for i, _ in added.values())}
    config = jsondoc.optional(path / "tokenizer_config.json", label)
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        token = str(entry["content"])
        if token not in ids and token not in added and int(number) not in taken:
            added[token] = (int(number), entry)
    return Tokens({**ids, **{token: i for token, (i, _) in added.items()}}, {t: _flags(entry) for t, (_, entry) in added.items()})


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}


def _converted(path: Path, label: str) -> Tokens:
    tokenizer = checked_tokenizer(path, label)
    added = {t.content: {flag: bool(getattr(t, flag)) for flag in _FLAGS} for t in tokenizer.added_tokens_decoder.values()}
    return Tokens({str(t): int(i) for t, i in tokenizer.get_vocab().items()}, added)


def checked_tokenizer(path: Path, label: str) -> Any:
    """The directory's tokenizer as transformers builds it. Errors: none there, one that it cannot build."""
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


def same_file(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tokenizer.json and the same tokens beside it."""
    files = [(d / "tokenizer.json", d / "tokenizer_config.json") for d in (one, other)]
    if not all(file.is_file() for file, _ in files) or files[0][0].read_bytes() != files[1][0].read_bytes():
        return False
    decoders = [jsondoc.optional(config).get("added_tokens_decoder") for _, config in files]
    return decoders[0] == decoders[1] or None in decoders


@dataclass(frozen=True)
class TokenDifference:
    """How a brick's vocabulary differs from the base's.

    Attributes:
        moved: Token -> (id in the brick, id in the base), where both have it at different ids.
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
            shown = [f"{t!r} is {i}, in the base {j}" for t, (i, j) in sorted(self.moved.items(), key=lambda m: m[1])[:3]]
            parts.append(f"{_count(self.moved)} at other ids ({_listed(shown, len(self.moved))})")
        for found, text in ((self.extra, "that the base lacks"), (self.lacking, "of the base missing")):
            if found:
                shown = [f"{t!r} {i}" for t, i in sorted(found.items(), key=lambda m: m[1])[:3]]
                parts.append(f"{_count(found)} {text} ({_listed(shown, len(found))})")
        return "; ".join(parts)


def _count(found: dict[str, Any]) -> str:
    return f"{len(found):,} token" + ("s" if len(found) != 1 else "")


def _listed(shown: Iterable[str], total: int) -> str:
    shown = list(shown)
    return ", ".join(shown) + (", …" if total > len(shown) else "")
