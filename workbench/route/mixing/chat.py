"""The last message of a user in a prompt under a chat template, which is what a router sees of a conversation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

_MARKS = ("first message §1", "answer §2", "second message §3")


@dataclass(frozen=True)
class ChatForm:
    """How a chat template writes the messages of a user.

    Attributes:
        opening: Text before a user's message.
        closing: Text after the last message, up to where the answer begins.
    """

    opening: str
    closing: str

    def last_message(self, text: str) -> str | None:
        """Return the last message of a user, if a text is a conversation that waits for an answer; None for other texts.

        Args:
            text: The text, special tokens included.
        """
        if not text.endswith(self.closing):
            return None
        before, opening, message = text[: len(text) - len(self.closing)].rpartition(self.opening)
        del before
        return message if opening else None


def chat_form(tokenizer: Any) -> ChatForm | None:
    """Return the form of a tokenizer's chat template; None without a template, or if messages have no text of their own around them.

    The template is applied to a message and to a conversation of three messages. What stands before both messages of the user is the
    opening of such a message; a default system prompt therefore does not belong to it.

    Args:
        tokenizer: A transformers tokenizer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, answer, second = _MARKS
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        texts = [
            str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True)) for part in (turns[:1], turns)
        ]
    except Exception:  # a template may refuse roles or raise anything else: prompts are then routed as they are
        return None
    if any(mark not in text for text, mark in zip(texts, (first, second), strict=True)) or answer not in texts[1]:
        return None
    closing = texts[0].rpartition(first)[2]
    between = texts[1].partition(answer)[2].rpartition(second)[0]
    opening = os.path.commonprefix([texts[0].partition(first)[0][::-1], between[::-1]])[::-1]
    return ChatForm(opening, closing) if opening.strip() and closing.strip() else None
