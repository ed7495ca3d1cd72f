"""Texts that methods read, as rows of tokens in batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench import jsondoc
from workbench.errors import WorkbenchError, nearest
from workbench.facts import joined
from workbench.models.architecture import max_positions
from workbench.models.batching import Batch, side_by_side
from workbench.models.prompts import encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("completion", "response", "answer", "target")


_EXPECTED = 'Expected one {"text": "..."}, or {"prompt": "...", "completion": "..."} (or response, answer, target), a line.'


BATCH_TOKENS = 4096
"""Of one forward pass, padding included."""


@dataclass(frozen=True)
class Text:
    """One line of a calibration file: a prompt and its answer, or a whole text as the answer to an empty prompt."""

    prompt: str
    answer: str
    place: str
    """file:line"""


@dataclass(frozen=True)
class TextRow:
    """A text as tokens, of which the last `learned` are what a loss is taken on."""

    tokens: list[int]
    learned: int


def read_texts(path: Path, shown: str, samples: int | None = None) -> list[Text]:
    """Read a jsonl of `{"text"}` or `{"prompt", "completion" | "response" | "answer" | "target"}`; fields of other names are ignored.

    Args:
        path: The file.
        shown: How errors call it.
        samples: At most so many, evenly spaced over the file; None for all. Every line is checked all the same.

    Errors, each with file and line: missing file, not JSON, missing or empty field, a row that states two different texts or answers, no texts.
    """
    try:
        lines = jsondoc.text_of(path, shown).split("\n")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        hint = nearest(path.name, near) if near else "Paths start at the project folder."
        raise WorkbenchError(f"{shown}: no such file of texts", hint) from None
    texts = [_text(line, f"{shown}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise WorkbenchError(f"{shown}: no texts", _EXPECTED)
    count = min(samples or len(texts), len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def _text(line: str, place: str) -> Text:
    row = jsondoc.parse(line, place, "One object a line.")
    if not isinstance(row, dict):
        raise WorkbenchError(f"{place}: expected an object, found {type(row).__name__}", _EXPECTED)
    answers = {key: row[key] for key in ANSWERS if key in row}
    if "text" in row and "prompt" in row:
        raise WorkbenchError(f"{place}: has both 'text' and 'prompt': one of them would not be read", "Take one of the two out.")
    if len({json.dumps(value, sort_keys=True) for value in answers.values()}) > 1:
        names = ", ".join(f"'{key}'" for key in answers)
        raise WorkbenchError(f"{place}: has several answers that differ ({names}): one alone would be read", "Keep one of them.")
    if "text" in row:
        return Text("", _field(row, "text", place), place)
    answer = next((key for key in ANSWERS if key in row), None)
    if "prompt" not in row or answer is None:
        raise WorkbenchError(
            f"{place}: expected 'text', or 'prompt' and an answer; found {', '.join(row) or 'nothing'}", _EXPECTED
        )
    return Text(_field(row, "prompt", place), _field(row, answer, place), place)


def _field(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else type(value).__name__
        raise WorkbenchError(f"{place}: expected a text in '{key}', found {found}", _EXPECTED)
    return value


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[TextRow]:
    """Tokenize texts. A prompt and its answer are tokenized together, with a space between them unless one of them brings it.

    What is longer than `longest` tokens loses the end of a whole text, or the start of a prompt.
    Errors: a text without tokens, a whole text of one token, on which no loss can be taken.
    """
    rows = []
    for text in texts:
        if text.prompt:
            pair = encode_pair(tokenizer, text.prompt, joined(text.prompt, text.answer))
            tokens, count = pair.tokens[-longest:], len(pair.continuation)
        else:
            whole: list[int] = tokenizer(text.answer)["input_ids"]
            tokens, count = whole[:longest], len(whole)
        learned = min(count, len(tokens) - 1)
        if learned < 1:
            raise WorkbenchError(
                f"{text.place}: {len(tokens)} token in the base's vocabulary, expected 2 or more",
                "Take the line out, or word it in what the tokenizer knows.",
            )
        rows.append(TextRow(tokens, learned))
    return rows


def longest_row(config: Mapping[str, Any], wanted: int) -> int:
    """Tokens of a row at most: as wanted, or as many positions as the model has."""
    positions = max_positions(config)
    return min(wanted, positions) if positions else wanted


def batches(rows: Sequence[TextRow], device: torch.device, limit: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Rows of similar length together, at most `limit` tokens a batch (or one row). The same batches on every machine."""
    waiting: list[list[int]] = []
    for tokens in sorted((row.tokens for row in rows), key=len):
        if waiting and len(tokens) * (len(waiting) + 1) > limit:
            yield side_by_side(waiting, device)
            waiting = []
        waiting.append(tokens)
    if waiting:
        yield side_by_side(waiting, device)


def log_likelihood(model: Any, row: TextRow, device: torch.device) -> Tensor:
    """Σ log p of a row's learned tokens, a scalar that gradients can be taken of."""
    tokens = torch.tensor([row.tokens], device=device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -row.learned - 1 : -1].float()
    return -torch.nn.functional.cross_entropy(logits, tokens[0, -row.learned :], reduction="sum")
