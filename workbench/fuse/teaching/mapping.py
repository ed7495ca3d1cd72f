"""Tokens of a teacher as tokens of the model that is trained: the first token of their text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.fuse.teaching.syncs import Vocabulary
from workbench.vocabulary.tokens import respelled, shared_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
