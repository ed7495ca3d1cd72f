"""Conversations as training rows: `{"messages": [{"role":, "content":}, ...]}`, in the words of the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError, nearest
from workbench.models.prompts import PromptPair, encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
_EXPECTED = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} on the line.'


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


def turns(row: Mapping[str, Any], place: str) -> list[tuple[tuple[Message, ...], str]]:
    """Return each answer of a conversation with the messages before it.

    Args:
        row: A row with the field `messages`.
        place: The row's place, as file:line.

    Raises:
        WorkbenchError: If the messages are no conversation, an answer is empty, or there is none.
    """
    listed = row["messages"]
    if not isinstance(listed, list) or not listed:
        raise WorkbenchError(f"{place}: expected a list of messages in 'messages', found {_kind(listed)}", _EXPECTED)
    if "tools" in row:
        raise WorkbenchError(
            f"{place}: 'tools' change the prompt, and are not read", "Remove the field, or write the tools into a message."
        )
    messages = [_message(one, f"{place}: message {number}") for number, one in enumerate(listed, 1)]
    found = [(tuple(messages[:i]), m.content) for i, m in enumerate(messages) if m.role == "assistant"]
    if not found:
        raise WorkbenchError(f"{place}: the conversation has no answer: no message has the role 'assistant'", _EXPECTED)
    if not found[0][0]:
        raise WorkbenchError(
            f"{place}: the conversation begins with an answer", "Begin it with a message of the role 'user' or 'system'."
        )
    return found


def plain(messages: Sequence[Message]) -> str:
    """Return messages as a text for digests, splits and messages to the user; models read the template's words instead."""
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str, place: str, end: bool = True
) -> tuple[PromptPair, bool]:
    """Tokenize an answer and the messages before it as the chat template words them.

    The prompt is what the model reads before it answers, with the template's generation prompt. The continuation is the answer and what
    the template writes after it, without white space at the end: usually the token that ends a turn.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages before the answer.
        answer: The answer.
        place: The row's place, for errors.
        end: Whether to keep what the template writes after the answer.

    Returns:
        Prompt and continuation, and whether the continuation ends with something after the answer.

    Raises:
        WorkbenchError: If the tokenizer has no template, the template refuses the messages, or it words them in another way once the
            answer is there.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise WorkbenchError(
            f"{place}: the row has messages, but the base's tokenizer has no chat template",
            "Write rows of prompt and completion, or train a base with a template.",
        )
    before = [{"role": m.role, "content": m.content} for m in messages]
    try:
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template([*before, {"role": "assistant", "content": answer}], tokenize=False))
    except Exception as error:  # templates raise errors of jinja, and their own
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WorkbenchError(
            f"{place}: the chat template refuses the messages: {text}", "Change the order or the roles of the messages."
        ) from error
    whole = whole.rstrip()
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise WorkbenchError(
            f"{place}: the chat template words the messages in another way once the answer is there, so that the answer has no place: the "
            f"prompt ends with {prompt[-40:]!r}",
            "Write the row as prompt and completion in the words that the model shall read.",
        )
    continuation = whole[len(prompt) :]
    stop = continuation.rfind(answer.strip()) + len(answer.strip())
    if not end and answer.strip() in continuation:
        continuation = continuation[:stop]
    return encode_rendered(tokenizer, prompt, continuation), len(continuation) > stop


def _message(one: Any, place: str) -> Message:
    if not isinstance(one, dict):
        raise WorkbenchError(f"{place}: expected an object with role and content, found {_kind(one)}", _EXPECTED)
    if unread := [key for key in one if key not in ("role", "content")]:
        raise WorkbenchError(f"{place}: the field '{unread[0]}' is not read", "Remove it, or write what it says into 'content'.")
    role, content = one.get("role"), one.get("content")
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise WorkbenchError(f"{place}: expected a role of {', '.join(ROLES)}, found {role!r}", hint or _EXPECTED)
    if not isinstance(content, str) or not content.strip():
        actual = "an empty text" if isinstance(content, str) else _kind(content)
        raise WorkbenchError(f"{place}: expected a text in 'content', found {actual}", _EXPECTED)
    return Message(role, content)


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else "nothing" if value is None else type(value).__name__
