"""Texts of jsonl files as tokens, and batches of rows for forward passes.

Rows are padded on the right. In a causal model a token sees only earlier tokens, so padding after a row changes nothing: positions,
attention and the state of recurrent layers are those of the row alone. Padding before a row would shift positions in models that count
them (GPT-2, GPTBigCode, XGLM, BioGPT, GPT-Neo) and change the state of recurrent layers without a mask (RWKV, RecurrentGemma).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.facts.facts import joined
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.project import suggestion
from workbench.ground.recognize import expecting
from workbench.models.architecture import max_positions
from workbench.models.prompts import Message, encode_pair, plain, read_tools, turns

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        tokens: [row, position].
        mask: [row, position], 1 for a token and 0 for padding.
        counted: [row, position], whether a token's states enter statistics: all but padding, unless the rows say which.
    """

    tokens: Tensor
    mask: Tensor
    counted: Tensor


def side_by_side(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Return rows of tokens as one batch, padded on the right with token 0."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    mask = mask.to(device)
    return Batch(tokens.to(device), mask, mask.bool())


def by_length(lengths: Sequence[int], limit: int, done: int = 0) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of similar length, the shortest rows first.

    Args:
        lengths: Number of tokens of each row.
        limit: Largest number of tokens of a batch, padding included; a longer row is a batch of its own.
        done: Number of rows in that order that are left out, because an earlier call has read them.
    """
    waiting: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i])[done:]:
        if waiting and lengths[i] * (len(waiting) + 1) > limit:
            yield waiting
            waiting = []
        waiting.append(i)
    if waiting:
        yield waiting


RowT = TypeVar("RowT")
ANSWERS = ("completion", "response", "answer", "target")
BATCH_TOKENS = 4096
"""Largest number of tokens in one forward pass, including padding."""
CPU_BATCH_TOKENS = 512
"""The same on a CPU, whose caches hold the activations of a small batch: a pass takes 0.6 times as long as with 4096."""
_EXPECTED = 'Write {"text": "..."}, or {"prompt": "...", "completion": "..."} (or response, answer, target), on each line.'
_EXPECTED_PROMPT = 'Write {"prompt": "..."} or {"text": "..."} on each line; other fields are ignored.'


@dataclass(frozen=True)
class Text:
    """One line of a calibration file: a prompt and its answer, or a complete text as the answer to an empty prompt."""

    prompt: str
    answer: str
    place: str
    """The text's place, as file:line."""
    messages: tuple[Message, ...] = ()
    """The messages up to the answer, if the text is a turn of a conversation; `prompt` and `answer` then show them as plain text."""
    tools: str = ""
    """JSON of the functions that the model may call in the conversation."""


@dataclass(frozen=True)
class TextRow:
    """A text as tokens."""

    tokens: list[int]
    learned: int
    """Number of tokens at the end on which the loss is computed."""
    counted: tuple[int, ...] | None = None
    """Places of the tokens whose states enter statistics; None if those of all tokens do."""


def read_texts(path: Path, label: str, samples: int | None = None, *, chat: bool = False) -> list[Text]:
    """Read a jsonl file of `{"text"}` or `{"prompt", "completion" | "response" | "answer" | "target"}`; other fields are ignored.

    Args:
        path: The file.
        label: The file's name in messages.
        samples: Largest number of texts, evenly spaced over the file; None takes all. Every line is checked in any case.
        chat: Whether the reader words conversations by a chat template. Rows of `{"messages"}` then give a text for each answer; otherwise
            they are refused.

    Raises:
        WorkbenchError: If the file is missing or not JSON, a field is missing or empty, a row has two different texts or answers, or
            there are no texts. The message names file and line.
    """
    with expecting(path, "a file of texts", "texts", "items", "facts"):
        texts = [text for place, line in _lines(path, label, "texts") for text in _parse_texts(line, place, chat)]
    if not texts:
        raise WorkbenchError(f"{label}: no texts", _EXPECTED)
    return spread(texts, samples)


def read_prompts(path: Path, label: str, samples: int | None = None, least: int = 1) -> list[str]:
    """Read the prompts of a jsonl file of `{"prompt"}` or `{"text"}`; other fields, such as answers, are ignored.

    Args:
        path: The file.
        label: The file's name in messages.
        samples: Largest number of prompts, in which every wording of the file occurs; None takes all. Every line is checked in any case.
        least: Smallest number of different prompts that the file must have.

    Returns:
        Different prompts, in the order of the file.

    Raises:
        WorkbenchError: If the file is missing or not JSON, a prompt is missing or empty, or there are too few.
    """
    prompts: dict[str, None] = {}
    for place, line in _lines(path, label, "prompts"):
        with expecting(path, "a file of prompts", "texts", "items", "facts"):
            row = jsondoc.parse(line, place, _EXPECTED_PROMPT)
        if not isinstance(row, dict):
            raise WorkbenchError(f"{place}: expected an object, found {type(row).__name__}", _EXPECTED_PROMPT)
        keys = [key for key in ("prompt", "text") if key in row]
        if len(keys) != 1:
            found = " and ".join(f"'{key}'" for key in keys) or ", ".join(row) or "nothing"
            raise WorkbenchError(f"{place}: expected either 'prompt' or 'text', found {found}", _EXPECTED_PROMPT)
        prompts[_text_field(row, keys[0], place, _EXPECTED_PROMPT)] = None
    different = list(prompts)
    if len(different) < least:
        found = f"{len(different)} different prompt{'s' * (len(different) > 1)}" if different else "no prompts"
        raise WorkbenchError(f"{label}: {found}, expected {least} or more", _EXPECTED_PROMPT)
    return different if samples is None or samples >= len(different) else _by_wording(different, samples)


def _by_wording(prompts: Sequence[str], count: int) -> list[str]:
    """Return some prompts, in their order, so that every frequent wording occurs about equally often.

    A wording is known by its first two words and its last one, with all digits made equal. Wordings that an even choice would take less
    than once are one group, because such prompts begin or end with what they are about.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        words = re.sub(r"\d", "0", prompt).split()
        groups.setdefault((*words[:2], words[-1]), []).append(number)
    frequent = [group for group in groups.values() if len(group) * count >= len(prompts)]
    rest = [number for group in groups.values() if len(group) * count < len(prompts) for number in group]
    parts = sorted([*frequent, *([rest] if rest else [])], key=len)
    chosen: list[int] = []
    for place, group in enumerate(parts):  # small groups first: what they lack is left to the others
        chosen += spread(group, (count - len(chosen)) // (len(parts) - place))
    return [prompts[number] for number in sorted(chosen)]


def spread(rows: Sequence[RowT], samples: int | None) -> list[RowT]:
    """Return at most so many rows, evenly spaced; None takes all."""
    count = len(rows) if samples is None else min(samples, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _lines(path: Path, label: str, content: str) -> list[tuple[str, str]]:
    """Return (place, line) of each line of a file that is not blank."""
    try:
        lines = jsondoc.text_of(path, label).split("\n")
    except FileNotFoundError:
        hint = suggestion(path) or "Paths start at the project directory."
        raise WorkbenchError(f"{label}: no such file of {content}", hint) from None
    return [(f"{label}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_texts(line: str, place: str, chat: bool) -> list[Text]:
    """Parse a line of a file of texts."""
    row = jsondoc.parse(line, place, _EXPECTED)
    if not isinstance(row, dict):
        raise WorkbenchError(f"{place}: expected an object, found {type(row).__name__}", _EXPECTED)
    return conversation(row, place, chat) if "messages" in row else [_text_of(row, place)]


def conversation(row: Mapping[str, object], place: str, chat: bool = True) -> list[Text]:
    """Return a text for each answer of a conversation.

    Raises:
        WorkbenchError: If the reader takes no conversations, the row has other texts too, or the messages are no conversation.
    """
    if not chat:
        raise WorkbenchError(f"{place}: 'messages' are read where a model is trained on them, and not here", _EXPECTED)
    if others := [key for key in ("text", "prompt", *ANSWERS) if key in row]:
        raise WorkbenchError(
            f"{place}: the row has both 'messages' and '{others[0]}', but only one is used", "Remove one of them."
        )
    tools = read_tools(row.get("tools"), place)
    return [Text(plain(turn[:-1], tools), turn[-1].text, place, turn, tools) for turn in turns(row, place)]


def _text_of(row: Mapping[str, object], place: str) -> Text:
    """Return the text of a row without messages."""
    answers = {key: row[key] for key in ANSWERS if key in row}
    if "text" in row and "prompt" in row:
        raise WorkbenchError(f"{place}: the row has both 'text' and 'prompt', but only one is used", "Remove one of them.")
    if len({json.dumps(value, sort_keys=True) for value in answers.values()}) > 1:
        names = ", ".join(f"'{key}'" for key in answers)
        raise WorkbenchError(
            f"{place}: the row has several different answers ({names}), but only one is used", "Keep one of them."
        )
    if "text" in row:
        return Text("", _text_field(row, "text", place), place)
    answer = next((key for key in ANSWERS if key in row), None)
    if "prompt" not in row or answer is None:
        raise WorkbenchError(
            f"{place}: expected 'text', or 'prompt' and an answer; found {', '.join(row) or 'nothing'}", _EXPECTED
        )
    return Text(_text_field(row, "prompt", place), _text_field(row, answer, place), place)


def _text_field(row: Mapping[str, object], key: str, place: str, expected: str = _EXPECTED) -> str:
    """Return a field that must hold a text that is not blank."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        actual = "an empty text" if isinstance(value, str) else type(value).__name__
        raise WorkbenchError(f"{place}: expected a text in '{key}', found {actual}", expected)
    return value


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[TextRow]:
    """Tokenize texts; a prompt and its answer are tokenized together, with a space between them if neither has one.

    Args:
        texts: The texts.
        tokenizer: The base's tokenizer.
        longest: Largest number of tokens. A longer text loses its end; a longer prompt with answer loses its start.

    Raises:
        WorkbenchError: If a text has fewer than two tokens, so that no loss can be computed.
    """
    rows = []
    for text in texts:
        if text.prompt:
            pair = encode_pair(tokenizer, text.prompt, joined(text.prompt, text.answer))
            tokens, count = pair.tokens[-longest:], len(pair.continuation)
        else:
            all_tokens: list[int] = tokenizer(text.answer)["input_ids"]
            tokens, count = all_tokens[:longest], len(all_tokens)
        learned = min(count, len(tokens) - 1)
        if learned < 1:
            raise WorkbenchError(
                f"{text.place}: {len(tokens)} token in the base's vocabulary, expected 2 or more",
                "Remove the line, or use a longer text.",
            )
        rows.append(TextRow(tokens, learned))
    return rows


def longest_row(config: Mapping[str, object], limit: int) -> int:
    """Return the largest number of tokens of a row: `limit`, or the model's number of positions if that is smaller."""
    positions = max_positions(config)
    return min(limit, positions) if positions else limit


def batch_limit(device: torch.device) -> int:
    """Return the largest number of tokens of a batch with which a forward pass is fast on a device."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def batches(rows: Sequence[TextRow], device: torch.device, limit: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Yield batches of rows of similar length, which are the same on every machine."""
    for places in by_length([len(row.tokens) for row in rows], limit):
        batch = side_by_side([rows[i].tokens for i in places], device)
        for row, i in enumerate(places):
            if (chosen := rows[i].counted) is not None:
                batch.counted[row] = False
                batch.counted[row, list(chosen)] = True
        yield batch


def log_likelihood(model: Any, row: TextRow, device: torch.device) -> Tensor:
    """Return the sum of log p over a row's learned tokens, as a differentiable scalar."""
    tokens = torch.tensor([row.tokens], device=device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -row.learned - 1 : -1].float()
    return -torch.nn.functional.cross_entropy(logits, tokens[0, -row.learned :], reduction="sum")
