"""The text of a user within a chat: the last message, without the template around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any

# What comes before and after a user's text in well-known templates, for models whose tokenizer has no template or another one.
_KNOWN = (
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>user\n", "<end_of_turn>"),
    ("[INST]", "[/INST]"),
    ("<|user|>\n", "<|end|>"),
    ("<|user|>\n", "</s>"),
    ("<|user|>\n", "<|assistant|>"),
    ("<｜User｜>", "<｜Assistant｜>"),
    ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>"),
    ("### Instruction:\n", "### Response:"),
)


@dataclass(frozen=True)
class ChatFrame:
    """The texts between which a user's text stands.

    Attributes:
        marks: Pairs of the text before (the opener) and the text after (the closer) of the tokenizer's own template. None is white
            space alone.
    """

    marks: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """Return the frame of a tokenizer's chat template, found by rendering it.

        A user's text is rendered with and without a system message, as first and as later message. The opener is the common end of what
        precedes it, the closer the common start of what follows it. What precedes it after a system message may have an end of its own.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls()
        gaps = {(system, later): _around(tokenizer, system, later) for system, later in product((False, True), (False, True))}
        found = [gap for gap in gaps.values() if gap]
        if not found:
            return cls()
        after = _common_start([gap[1] for gap in found])
        befores = [gap[0][::-1] for (system, later), gap in gaps.items() if gap and (later or not system)]
        openers = [_common_start(befores)[::-1]]
        if (first := gaps[True, False]) and not (openers[0].strip() and first[0].endswith(openers[0])):
            openers.append(first[0])
        return cls(tuple((opener, after) for opener in openers if opener.strip() and after.strip()))

    def message(self, text: str) -> str:
        """Return the last user message of a text; the text itself if no template is around it.

        Args:
            text: A text with the template's special tokens.
        """
        for marks in (self.marks, _KNOWN):
            starts = {opener: text.rfind(opener) + len(opener) for opener, _ in marks if opener in text}
            found = [(starts[opener], -text.find(closer, starts[opener])) for opener, closer in marks if opener in starts]
            if ended := [(start, minus) for start, minus in found if minus <= 0]:
                start, minus = max(ended)  # the last opener, and the first of its closers
                return text[start:-minus].strip("\n ")
        return text


def _around(tokenizer: Any, system: bool, later: bool) -> tuple[str, str] | None:
    """Return what stands between the content before a user's text and that text, and what follows it; None if it cannot be rendered."""
    user, marks = "<<user-text>>", ("<<system-text>>", "<<first-text>>", "<<answer-text>>")
    messages = [{"role": "system", "content": marks[0]}] * system
    messages += [{"role": "user", "content": marks[1]}, {"role": "assistant", "content": marks[2]}] * later
    messages += [{"role": "user", "content": user}]
    texts = []
    for answer in (True, False):
        before, found, after = _rendered(tokenizer, messages, answer).rpartition(user)
        if found:
            last = max(before.rfind(mark) + len(mark) if mark in before else 0 for mark in marks)
            texts.append((before[last:], after))
    if not texts:
        return None
    whole, common = texts[0][1], _common_start([after for _, after in texts])
    return texts[0][0], common if common.strip() else whole


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], answer: bool) -> str:
    """Return messages under the chat template, with the start of an answer or without; nothing if the template takes no such messages."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except Exception:  # noqa: BLE001  a template is code of the model's author and may fail in any way
        return ""


def _common_start(texts: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
