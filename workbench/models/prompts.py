"""Prompts and continuations as tokens: both are tokenized as one text, which is split where the continuation begins.

Tokenizers that put a space mark in front of every text (Llama 2 and Mistral: the normalizer `Prepend("▁")`, or Metaspace with
`prepend_scheme: first`) give " Paris" other tokens when it stands alone than when it follows a prompt: "▁", "▁Paris" against "▁Paris".
A model that learns the former writes two spaces, and lm-eval, which tokenizes the whole text, never sees what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# How vocabularies write white space at the end of a token: byte-level ones map bytes to letters, SentencePiece has its own mark.
_BLANKS = " \t\r\n\u2581\u0120\u010a\u0109\u010d"
# Stands in front of words that are tokenized as they are inside a text.
_ANY_WORD = "A"


@dataclass(frozen=True)
class PromptPair:
    """The tokens of a prompt and of its continuation.

    Attributes:
        prompt: Its tokens, behind the special tokens that the tokenizer puts in front of a text.
        continuation: Its tokens, without a special token that the tokenizer puts at the end of a text.
        offsets: First character of each token in prompt + continuation and the one after its last, where the tokenizer knows them.
    """

    prompt: list[int]
    continuation: list[int]
    offsets: list[tuple[int, int]] | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation."""
        return [*self.prompt, *self.continuation]


def encode_pair(
    tokenizer: Any, prompt: str, continuation: str, trailing_space: Literal["prompt", "continuation"] = "prompt"
) -> PromptPair:
    """Tokenize prompt + continuation as one text and split the tokens where the continuation begins.

    A token that covers the end of the prompt and the beginning of the continuation belongs to the continuation: the model has to
    produce it. "is " + "Paris" is thus split into "is" and " Paris" by a tokenizer that has " Paris" as a token.

    Where the tokenizer does not know offsets (one without tokenizer.json), the prompt's tokens are those at the start of the whole text
    that are also at the start of the prompt's own tokens.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: May be empty; its tokens are then the special tokens that begin a text.
        continuation: With the space that separates it from the prompt, if there is one.
        trailing_space: Where tokens go that hold nothing but white space of the prompt's end. lm-eval scores them with the continuation
            (`_encode_pair`), and edits are scored by lm-eval. A token such as ":\\n" that has more in it stays with the prompt.
    """
    words = prompt.rstrip() if trailing_space == "continuation" else prompt
    ids, offsets, begin = _tokens(tokenizer, prompt + continuation)
    if offsets is None:
        alone = _tokens(tokenizer, words)[0]
        if (split := _shared(ids, alone)) < len(alone):
            split = _shared(ids, _tokens(tokenizer, prompt)[0])
    else:
        split = next((i for i in range(begin, len(ids)) if offsets[i][1] > len(prompt) or offsets[i][0] >= len(words)), len(ids))
        # Byte-level post-processors may cut spaces off the offsets: of ": " they say that it is ":".
        while split > begin and _reaches_beyond(tokenizer, ids[split - 1], prompt, continuation):
            split -= 1
    return PromptPair(ids[:split], ids[split:], offsets)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text that something follows: special tokens at its start, none at its end."""
    return _tokens(tokenizer, text)[0]


def encode_inside(tokenizer: Any, text: str) -> PromptPair:
    """Tokenize words as they are tokenized inside a text, after a space. `prompt` is what stands before them; offsets start at the words."""
    found = encode_pair(tokenizer, _ANY_WORD, f" {text}")
    shift = len(_ANY_WORD) + 1
    offsets = None if found.offsets is None else [(max(0, a - shift), max(0, b - shift)) for a, b in found.offsets]
    return PromptPair(found.prompt, found.continuation, offsets)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None, int]:
    """Tokens of a text, their offsets, and how many special tokens the tokenizer has put in front. Special tokens that it puts at the
    end are left out, and so is a second beginning-of-text token where the text itself begins with one."""
    offsets: list[tuple[int, int]] | None = None
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
        offsets = [(int(first), int(last)) for first, last in found["offset_mapping"]]
        begin = next((i for i, mark in enumerate(added) if not mark), len(ids))
        end = len(ids) - next((i for i, mark in enumerate(reversed(added)) if not mark), len(ids) - begin)
    else:
        ids, bare = list(tokenizer(text)["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
        begin = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), 0)
        end = begin + len(bare) if bare else len(ids)
    ids, offsets = ids[:end], None if offsets is None else offsets[:end]
    if begin == 1 and len(ids) > 1 and ids[0] == ids[1] == getattr(tokenizer, "bos_token_id", None):
        return ids[1:], None if offsets is None else offsets[1:], 0
    return ids, offsets, begin


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _reaches_beyond(tokenizer: Any, token: int, prompt: str, continuation: str) -> bool:
    """Return whether a token at the end of the prompt ends in more white space than the prompt does."""
    if not continuation[:1].isspace():
        return False
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return len(piece) - len(piece.rstrip(_BLANKS)) > len(prompt) - len(prompt.rstrip())
