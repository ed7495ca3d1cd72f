"""Alignment of two tokenizers: places where their tokens end together, and tokens of one as tokens of the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import WorkbenchError
from workbench.facts import joined
from workbench.models.prompts import encode_pair
from workbench.vocabulary.tokens import Tokens, checked_tokenizer, read_tokens, respelled, shared_rows, spelling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workbench.models.texts import Text


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as tokens of one tokenizer.

    Attributes:
        ids: Token ids, after the special tokens that the tokenizer puts in front of a text.
        ends: Number of characters of the text up to the end of each token; 0 for special tokens in front.
        first: Index of the token that predicts the first token of the completion, or of a text without a prompt.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    first: int


class Vocabulary:
    """A tokenizer, and the text that each of its tokens stands for.

    Args:
        path: Directory of the tokenizer.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no tokenizer, or it cannot tell where its tokens are in a text.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.tokens: Tokens = read_tokens(path, label)
        self.spell = spelling(path, label)
        self.tokenizer: Any = checked_tokenizer(path, label)
        self.size = max(self.tokens.ids.values(), default=-1) + 1
        self.pieces: list[bytes | None] = [None] * self.size
        """Bytes of each token; None for special tokens."""
        for token, i in self.tokens.ids.items():
            flags = self.tokens.added.get(token)
            if flags is None:
                self.pieces[i] = self.spell(token)
            elif not flags.get("special", True):  # such as runs of spaces, which are added as they stand in texts
                self.pieces[i] = token.encode()
        if not getattr(self.tokenizer, "is_fast", False):
            raise WorkbenchError(
                f"{label}: its tokenizer in {path} does not say where its tokens are in a text, which the alignment of tokens needs",
                "Save it as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
            )

    def read(self, text: Text) -> Reading:
        """Return a text as tokens. A prompt and its completion are one text, as in training."""
        continuation = joined(text.prompt, text.answer) if text.prompt else text.answer
        pair = encode_pair(self.tokenizer, text.prompt, continuation)
        assert pair.offsets is not None  # fast tokenizers have offsets
        ends = np.maximum.accumulate(np.array([end for _, end in pair.offsets], dtype=np.int64))
        return Reading(np.array(pair.tokens, dtype=np.int64), ends, max(len(pair.prompt) - 1, 0))


def sync_points(
    one: Reading, pieces: list[bytes | None], other: Reading, other_pieces: list[bytes | None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the tokens of two readings that end at the same character, before text that both spell alike.

    Of several tokens that end at one character, such as the bytes of a letter, only the last one counts. The next tokens must begin
    with the same bytes: one tokenizer may have read a space already, or write capitals as small letters, and its distribution is
    then about another text. At the end of the text there is no next token.

    Args:
        one: The text in one tokenizer's tokens.
        pieces: Bytes of each of its tokens by id.
        other: The text in another tokenizer's tokens.
        other_pieces: Bytes of each of its tokens by id.

    Returns:
        Indices into the tokens of both readings, increasing.
    """
    last, other_last = _last_of_each_end(one.ends), _last_of_each_end(other.ends)
    _, found, other_found = np.intersect1d(one.ends[last], other.ends[other_last], assume_unique=True, return_indices=True)
    i, j = last[found], other_last[other_found]
    same = [_alike(_next(one, a, pieces), _next(other, b, other_pieces)) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    keep = np.array(same, dtype=bool)
    return i[keep], j[keep]


def _last_of_each_end(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the last token of each end."""
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], True)) if len(ends) else np.zeros(0, dtype=np.int64)


def _next(reading: Reading, place: int, pieces: list[bytes | None]) -> bytes | None:
    """Return the bytes of the token after a place; nothing at the end, and None for a special token."""
    return pieces[reading.ids[place + 1]] if place + 1 < len(reading.ids) else b""


def _alike(one: bytes | None, other: bytes | None) -> bool:
    """Return whether two next tokens begin with the same bytes, or both texts end."""
    if one is None or other is None:
        return False
    return one == other or (bool(one) and bool(other) and (one.startswith(other) or other.startswith(one)))


NONE = -1
"""Stands for a token that the other vocabulary cannot begin to write."""


def token_map(teacher: Vocabulary, pivot: Vocabulary) -> NDArray[np.int64]:
    """Return for each token of a teacher the token that the trained model would read first in its text.

    A token that both have is mapped to itself, and the end of a text to the end of a text. Other special tokens, and texts that no
    token begins, are mapped to `NONE`.

    Args:
        teacher: The teacher's vocabulary.
        pivot: The vocabulary of the model that is trained.

    Returns:
        Ids of the trained model, [token of the teacher].
    """
    found = np.full(teacher.size, NONE, dtype=np.int64)
    first = _FirstTokens(pivot)
    for i, text in enumerate(teacher.pieces):
        if text:
            found[i] = first.of(text)
    for token, row in shared_rows(pivot.tokens, pivot.spell, teacher.tokens, teacher.spell).items():
        found[teacher.tokens.ids[token]] = row
    ends = [vocabulary.tokenizer.eos_token_id for vocabulary in (teacher, pivot)]
    if None not in ends:
        found[ends[0]] = ends[1]
    return found


class _FirstTokens:
    """The first token of a text in the middle of another one.

    Args:
        vocabulary: The vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spell, self._pieces, self._ids = vocabulary.spell, vocabulary.pieces, vocabulary.tokens.ids
        self._model = vocabulary.tokenizer.backend_tokenizer.model
        # Of several tokens with one text, such as a letter and its byte, the last one is the ordinary one: bytes come first.
        self._by_text = {text: i for i, text in enumerate(self._pieces) if text}

    def of(self, text: bytes) -> int:
        """Return the first token that the tokenizer writes a text with; `NONE` if no token begins the text.

        The tokenizer's model splits the text. If it cannot, because the text has parts of a character, or if its first token is
        another text, such as that of an unknown character, the longest token that begins the text is taken.
        """
        if text in self._by_text:
            return self._by_text[text]
        written = respelled(self._spell, text)
        if written:
            tokens = self._model.tokenize(written)
            piece = self._pieces[tokens[0].id] if tokens else None
            if piece and text.startswith(piece):
                return int(tokens[0].id)
        return next((self._by_text[text[:n]] for n in range(len(text), 0, -1) if text[:n] in self._by_text), NONE)
