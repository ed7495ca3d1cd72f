"""Copies of calibration prompts as users might write them: in lower case and behind a greeting."""

from __future__ import annotations

from typing import Any

GREETINGS = (
    "Hello! ",
    "Hi there. ",
    "Good morning, I have a request. ",
    "Hey, can you help me with something? ",
    "Thank you for your last answer, that was useful. ",
    "I am working on a list and need one more thing. ",
)
"""Texts in front of a prompt. A greeting may be as long as the prompt."""
COPIES = ("plain", "lower", "greeting")
"""Kinds of copies."""


def copies(prompt: str, number: int) -> dict[str, str]:
    """Return a prompt by kind of copy.

    Args:
        prompt: The prompt.
        number: Its number, which chooses the greeting.
    """
    return {"plain": prompt, "lower": prompt.lower(), "greeting": GREETINGS[number % len(GREETINGS)] + prompt}


def chat_frame(tokenizer: Any) -> tuple[str, str, str] | None:
    """Return the texts that a chat template puts around a user's message, or None if the tokenizer has no usable template.

    A template that separates messages by white space alone is not usable: its texts cannot be told from plain ones.

    Returns:
        The text before the first message, the text before a later one (from the end of the answer before it), and the text after it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, answer = "<<user-text>>", "<<answer-text>>"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}, {"role": "user", "content": user}]
    try:
        first = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        later = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001  a template is code of the model's author and may fail in any way
        return None
    before, found, after = first.partition(user)
    _, _, rest = later.partition(answer)
    between, found_again, _ = rest.partition(user)
    return (before, between, after) if found and found_again and between.strip() and after.strip() else None


def without_template(text: str, frame: tuple[str, str, str] | None) -> str:
    """Return the last user message of a text under a chat template; the text itself if the template is not around it.

    Args:
        text: A text with the template's special tokens.
        frame: What `chat_frame` returns.
    """
    if frame is None:
        return text
    before, between, after = frame
    if not text.endswith(after):
        return text
    if between in text:
        return text[: -len(after)].rpartition(between)[2]
    return text[: -len(after)].removeprefix(before) if text.startswith(before) else text
