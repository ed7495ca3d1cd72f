"""Prompts, continuations and conversations as tokens.

A prompt and its continuation are tokenized as one text, which is split where the continuation begins. Tokenizers that put a space mark in
front of every text (Llama 2 and Mistral: the normalizer `Prepend("▁")`, or Metaspace with `prepend_scheme: first`) give " Paris" alone
other tokens than after a prompt: "▁", "▁Paris" instead of "▁Paris". A model that learns the former writes two spaces, and lm-eval, which
tokenizes the whole text, does not score what was learned.

Conversations are rows `{"messages": [{"role":, "content":}, ...]}`, which the model's chat template words, perhaps with `tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, gguf_file: str | None = None, label: str = "") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory, without running code from it and without the network.

    Args:
        path: The directory.
        gguf_file: Name of the GGUF file in it that has the tokenizer.
        label: Owner of the tokenizer, for messages.

    Raises:
        WorkbenchError: If transformers cannot build it.
    """
    from transformers import AutoTokenizer

    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **source
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        owner = f"{label}: " if label else ""
        raise WorkbenchError(
            f"{owner}transformers cannot build the tokenizer in {path} ({type(error).__name__}: {str(error)[:200]})",
            "Save it again as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        ) from error
    return loaded


# White space at the end of a token, as vocabularies write it: byte-level ones map bytes to letters, SentencePiece has its own mark.
_BLANKS = " \t\r\n\u2581\u0120\u010a\u0109\u010d"
# Text in front of words that are tokenized as inside a text.
_ANY_WORD = "A"


@dataclass(frozen=True)
class PromptPair:
    """The tokens of a prompt and of its continuation.

    Attributes:
        prompt: The prompt's tokens, after the special tokens that the tokenizer puts in front of a text.
        continuation: The continuation's tokens, without special tokens that the tokenizer puts at the end of a text.
        offsets: (start, end) of each token in prompt + continuation, in characters; None if the tokenizer does not provide offsets.
    """

    prompt: list[int]
    continuation: list[int]
    offsets: list[tuple[int, int]] | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens of prompt and continuation."""
        return [*self.prompt, *self.continuation]


def encode_pair(
    tokenizer: Any, prompt: str, continuation: str, trailing_space: Literal["prompt", "continuation"] = "prompt"
) -> PromptPair:
    r"""Tokenize prompt + continuation as one text and split the tokens where the continuation begins.

    A token that covers the end of the prompt and the beginning of the continuation belongs to the continuation, because the model must
    produce it. A tokenizer with the token " Paris" therefore splits "is " + "Paris" into "is" and " Paris".

    If the tokenizer does not provide offsets (no tokenizer.json), the prompt's tokens are the common start of the tokens of the whole
    text and of the prompt alone.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The prompt. If it is empty, its tokens are the special tokens at the start of a text.
        continuation: The continuation, including the space that separates it from the prompt, if there is one.
        trailing_space: Owner of tokens that are only white space at the end of the prompt. lm-eval scores them with the continuation
            (`_encode_pair`), and edits are scored by lm-eval. A token such as ":\n" with other characters stays with the prompt.
    """
    words = prompt.rstrip() if trailing_space == "continuation" else prompt
    ids, offsets, begin = _tokens(tokenizer, prompt + continuation)
    if offsets is None:
        alone = _tokens(tokenizer, words)[0]
        if (split := _common_prefix_length(ids, alone)) < len(alone):
            split = _common_prefix_length(ids, _tokens(tokenizer, prompt)[0])
    else:
        split = next((i for i in range(begin, len(ids)) if offsets[i][1] > len(prompt) or offsets[i][0] >= len(words)), len(ids))
        # Byte-level post-processors may exclude spaces from offsets: the token ": " then has the offsets of ":".
        while split > begin and _reaches_beyond(tokenizer, ids[split - 1], prompt, continuation):
            split -= 1
    return PromptPair(ids[:split], ids[split:], offsets)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text that is continued: with special tokens at its start and without those at its end."""
    return _tokens(tokenizer, text)[0]


def encode_rendered(tokenizer: Any, prompt: str, continuation: str) -> PromptPair:
    """Tokenize a prompt and its continuation that a chat template has worded, special tokens included.

    They are tokenized as one text, and the prompt's tokens are the common start of these tokens and those of the prompt alone.
    """
    ids, alone = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt + continuation, prompt))
    split = _common_prefix_length(ids, alone)
    return PromptPair(ids[:split], ids[split:], None)


def encode_inside(tokenizer: Any, text: str) -> PromptPair:
    """Tokenize words as inside a text, after a space.

    Returns:
        The words as `continuation`, after an arbitrary `prompt`. Offsets are relative to the words.
    """
    pair = encode_pair(tokenizer, _ANY_WORD, f" {text}")
    shift = len(_ANY_WORD) + 1
    offsets = None if pair.offsets is None else [(max(0, a - shift), max(0, b - shift)) for a, b in pair.offsets]
    return PromptPair(pair.prompt, pair.continuation, offsets)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None, int]:
    """Tokenize a text without special tokens at its end, and without a second beginning-of-text token at its start.

    Returns:
        The tokens, their offsets if the tokenizer provides them, and the number of special tokens at the start.
    """
    offsets: list[tuple[int, int]] | None = None
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
        offsets = [(int(first), int(last)) for first, last in encoding["offset_mapping"]]
        begin = next((i for i, mark in enumerate(added) if not mark), len(ids))
        end = len(ids) - next((i for i, mark in enumerate(reversed(added)) if not mark), len(ids) - begin)
    else:
        ids, plain_ids = list(tokenizer(text)["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
        begin = next((i for i in range(len(ids) - len(plain_ids) + 1) if ids[i : i + len(plain_ids)] == plain_ids), 0)
        end = begin + len(plain_ids) if plain_ids else len(ids)
    ids, offsets = ids[:end], None if offsets is None else offsets[:end]
    if begin == 1 and len(ids) > 1 and ids[0] == ids[1] == getattr(tokenizer, "bos_token_id", None):
        return ids[1:], None if offsets is None else offsets[1:], 0
    return ids, offsets, begin


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common start of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _reaches_beyond(tokenizer: Any, token: int, prompt: str, continuation: str) -> bool:
    """Return whether a token at the end of the prompt ends in more white space than the prompt does."""
    if not continuation[:1].isspace():
        return False
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return len(piece) - len(piece.rstrip(_BLANKS)) > len(prompt) - len(prompt.rstrip())


ROLES = ("system", "developer", "user", "assistant", "tool")
_EXPECTED = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} on the line.'
_TOOLS = (
    'Write {"tools": [{"type": "function", "function": {"name": "...", "parameters": {...}}}], "messages": [...]} on the line.'
)
_CALLS = 'Write {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}]}.'


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str
    more: str = ""
    """JSON of the fields for tools, if there are any: `tool_calls` of an answer, `tool_call_id` and `name` of a tool's result."""

    @property
    def text(self) -> str:
        """The content and the fields for tools, for digests and messages to the user."""
        return " ".join(filter(None, (self.content, self.more)))

    def fields(self) -> dict[str, object]:
        """Return the message as templates read it."""
        return {"role": self.role, "content": self.content, **json.loads(self.more or "{}")}


def turns(row: Mapping[str, object], place: str) -> list[tuple[Message, ...]]:
    """Return each answer of a conversation behind the messages before it.

    Raises:
        WorkbenchError: If the messages are no conversation, an answer is empty, or there is none.
    """
    listed = row["messages"]
    if not isinstance(listed, list) or not listed:
        raise WorkbenchError(f"{place}: expected a list of messages in 'messages', found {_kind(listed)}", _EXPECTED)
    messages = [_message(one, f"{place}: message {number}") for number, one in enumerate(listed, 1)]
    found = [tuple(messages[: i + 1]) for i, m in enumerate(messages) if m.role == "assistant"]
    if not found:
        raise WorkbenchError(f"{place}: the conversation has no answer: no message has the role 'assistant'", _EXPECTED)
    if len(found[0]) == 1:
        raise WorkbenchError(
            f"{place}: the conversation begins with an answer", "Begin it with a message of the role 'user' or 'system'."
        )
    return found


def read_tools(found: object, place: str) -> str:
    """Return the JSON of a row's tools, which may be written as a list or as its JSON; nothing if there are none.

    Raises:
        WorkbenchError: If they are no list of functions with a name.
    """
    tools = jsondoc.parse(found, f"{place}: tools", _TOOLS) if isinstance(found, str) and found else found or []
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WorkbenchError(f"{place}: expected a list of functions in 'tools', found {tools!r:.60}", _TOOLS)
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def plain(messages: Sequence[Message], tools: str = "") -> str:
    """Return messages as a text for digests, splits and messages to the user; models read the template's words instead."""
    return "\n".join([*([f"tools: {tools}"] if tools else []), *(f"{m.role}: {m.text}" for m in messages)])


def check_template(suite: str, tokenizer: Any) -> None:
    """Raise WorkbenchError if the tokenizer has no chat template, which the suite uses."""
    if not getattr(tokenizer, "chat_template", None):
        raise WorkbenchError(
            f"suite '{suite}' uses the chat template, but the tokenizer has none",
            "Remove chat_template from the suite, or add the template to the tokenizer.",
        )


def worded(tokenizer: Any, messages: Sequence[Mapping[str, object]], place: str, *, answers: bool = True, tools: str = "") -> str:
    """Return messages as the chat template words them, with the beginning of the answer if the model `answers`.

    `tools` is the JSON of the functions that the model may call.

    Raises:
        WorkbenchError: If the template refuses the messages.
    """
    try:
        listed = json.loads(tools) if tools else None
        return str(tokenizer.apply_chat_template(list(messages), tools=listed, tokenize=False, add_generation_prompt=answers))
    except Exception as error:  # templates raise errors of jinja, and their own
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WorkbenchError(
            f"{place}: the chat template refuses the messages: {text}", "Change the order or the roles of the messages."
        ) from error


def as_message(tokenizer: Any, prompt: str) -> str | None:
    """Return a prompt as a user's message, up to where the model answers; None if the tokenizer has no template that words it."""
    try:
        text = worded(tokenizer, [{"role": "user", "content": prompt}], prompt)
    except WorkbenchError:
        return None
    return text if prompt in text else None


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str, end: bool = True, tools: str = ""
) -> tuple[PromptPair, bool]:
    """Tokenize an answer and the messages before it as the chat template words them. Tool calls are a part of the answer.

    The prompt is what the model reads before it answers, with the template's generation prompt. The continuation is the answer and what
    the template writes after it, without white space at the end: usually the token that ends a turn.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages before the answer, and the answer.
        place: The row's place, for errors.
        end: Whether to keep what the template writes after the answer.
        tools: JSON of the functions that the model may call.

    Returns:
        Prompt and continuation, and whether the continuation ends with something after the answer.

    Raises:
        WorkbenchError: If the tokenizer has no template, the template refuses the messages or leaves out what concerns tools, or it words
            the messages in another way once the answer is there.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise WorkbenchError(
            f"{place}: the row has messages, but the base's tokenizer has no chat template",
            "Write rows of prompt and completion, or train a base with a template.",
        )
    listed, answer = [m.fields() for m in messages], messages[-1].content.strip()
    prompt = worded(tokenizer, listed[:-1], place, tools=tools)
    whole = worded(tokenizer, listed, place, answers=False, tools=tools)
    _refuse_left_out(tokenizer, listed, tools, place, whole)
    whole = whole.rstrip()
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise WorkbenchError(
            f"{place}: the chat template words the messages in another way once the answer is there, so that the answer has no place: the "
            f"prompt ends with {prompt[-40:]!r}",
            "Write the row as prompt and completion in the words that the model shall read.",
        )
    continuation = whole[len(prompt) :]
    stop = continuation.rfind(answer) + len(answer)
    if messages[-1].more:  # the words of a call are those of the template, so its end is known by special tokens alone
        marks = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
        stop = len(re.split(rf"(?:\s*(?:{marks}))*\Z", continuation, maxsplit=1)[0])
    if not end and (messages[-1].more or answer in continuation):
        continuation = continuation[:stop]
    return encode_rendered(tokenizer, prompt, continuation), len(continuation) > stop


def _refuse_left_out(tokenizer: Any, messages: list[Any], tools: str, place: str, words: str) -> None:
    """Raise WorkbenchError if the template words the messages in the same way with other tools, calls or results."""
    calls = [
        m | {"tool_calls": [c | {"function": c["function"] | {"name": c["function"]["name"] + "x"}} for c in m["tool_calls"]]}
        if "tool_calls" in m
        else m
        for m in messages
    ]
    results = [m | {"content": m["content"] + "x"} if m["role"] == "tool" else m for m in messages]
    others = (("'tools'", messages, ""), ("'tool_calls'", calls, tools), ("messages of the role 'tool'", results, tools))
    for what, changed, given in others:
        if (changed, given) != (messages, tools) and worded(tokenizer, changed, place, answers=False, tools=given) == words:
            raise WorkbenchError(
                f"{place}: the base's chat template leaves out {what}",
                "Train a base whose template supports tools, or write them as text into a message.",
            )


def _calls(found: Any, place: str) -> list[Any]:
    """Return tool calls with their arguments as objects: templates write them as JSON, a text would become JSON twice."""
    calls: list[Any] = found if isinstance(found, list) else [None]
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WorkbenchError(f"{place}: expected a list of calls in 'tool_calls', found {found!r:.60}", _CALLS)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = jsondoc.parse(arguments, f"{place}: arguments", _CALLS)
        if not isinstance(arguments, dict):
            raise WorkbenchError(f"{place}: expected an object in 'arguments', found {_kind(arguments)}", _CALLS)
        calls[number] = {**call, "function": {**function, "arguments": arguments}}
    return calls


def _message(one: Any, place: str) -> Message:
    if not isinstance(one, dict):
        raise WorkbenchError(f"{place}: expected an object with role and content, found {_kind(one)}", _EXPECTED)
    one = {key: value for key, value in one.items() if value is not None and (key, value) != ("tool_calls", [])}
    own = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}.get(str(one.get("role")), ())
    if unread := [key for key in one if key not in ("role", "content", *own)]:
        raise WorkbenchError(f"{place}: the field '{unread[0]}' is not read", "Remove it, or write what it says into 'content'.")
    role, content = one.get("role"), one.get("content")
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise WorkbenchError(f"{place}: expected a role of {', '.join(ROLES)}, found {role!r}", hint or _EXPECTED)
    more = {key: one[key] for key in own if key in one}
    if "tool_calls" in more:
        more["tool_calls"], content = _calls(more["tool_calls"], place), content or ""
    if not isinstance(content, str) or not (content.strip() or "tool_calls" in more):
        actual = "an empty text" if isinstance(content, str) else _kind(content)
        raise WorkbenchError(f"{place}: expected a text in 'content', found {actual}", _EXPECTED)
    return Message(role, content, json.dumps(more, ensure_ascii=False) if more else "")


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else "nothing" if value is None else type(value).__name__
