"""Calibration texts: what data-driven merge methods read, as users write it, and as batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from workbench import jsondoc
from workbench.errors import WorkbenchError, nearest
from workbench.fields import BrickEntry, Bricks, Whole
from workbench.merge.least_squares import not_negative
from workbench.registry import MergeContext, MergeMethod
from workbench.weights.digests import file_digest, json_digest

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
class Row:
    """A text as tokens, of which the last `learned` are what a loss is taken on."""

    tokens: list[int]
    learned: int


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, where a causal model cannot see the padding.

    Attributes:
        tokens: [row, position].
        mask: [row, position], 1 where a token stands.
    """

    tokens: Tensor
    mask: Tensor


def read_texts(path: Path, shown: str, samples: int | None = None) -> list[Text]:
    """Read a jsonl of `{"text"}` or `{"prompt", "completion" | "response" | "answer" | "target"}`; other fields are ignored.

    Args:
        path: The file.
        shown: How errors call it.
        samples: At most so many, evenly spaced over the file; None for all. Every line is checked all the same.

    Errors, each with file and line: missing file, not JSON, missing or empty field, no texts.
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


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Row]:
    """Texts as tokens: the prompt by itself, as a model is asked; then a blank, unless one is there, and the answer.

    What is longer than `longest` tokens loses the end of a whole text, or the start of a prompt.
    Errors: a text without tokens, a whole text of one token, on which no loss can be taken.
    """
    rows = []
    for text in texts:
        head: list[int] = tokenizer(text.prompt)["input_ids"] if text.prompt else []
        blank = "" if not text.prompt or text.prompt[-1].isspace() or text.answer[0].isspace() else " "
        tail: list[int] = tokenizer(blank + text.answer, add_special_tokens=not text.prompt)["input_ids"]
        tokens = (head + tail)[-longest:] if text.prompt else tail[:longest]
        learned = min(len(tail), len(tokens) - 1)
        if learned < 1:
            raise WorkbenchError(
                f"{text.place}: {len(tokens)} token in the base's vocabulary, expected 2 or more",
                "Take the line out, or word it in what the tokenizer knows.",
            )
        rows.append(Row(tokens, learned))
    return rows


def longest_row(config: Mapping[str, Any], wanted: int) -> int:
    """Tokens of a row at most: as wanted, or as many positions as the model has."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return min(wanted, int(positions)) if positions else wanted


def batches(rows: Sequence[Row], device: torch.device, limit: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Rows of similar length together, at most `limit` tokens a batch (or one row). The same batches on every machine."""
    waiting: list[list[int]] = []
    for tokens in sorted((row.tokens for row in rows), key=len):
        if waiting and len(tokens) * (len(waiting) + 1) > limit:
            yield side_by_side(waiting, device)
            waiting = []
        waiting.append(tokens)
    if waiting:
        yield side_by_side(waiting, device)


def side_by_side(rows: list[list[int]], device: torch.device) -> Batch:
    """Rows as one batch, padded on the right with token 0."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Batch(tokens.to(device), mask.to(device))


def log_likelihood(model: Any, row: Row, device: torch.device) -> Tensor:
    """Σ log p of a row's learned tokens, a scalar that gradients can be taken of."""
    tokens = torch.tensor([row.tokens], device=device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -row.learned - 1 : -1].float()
    return -torch.nn.functional.cross_entropy(logits, tokens[0, -row.learned :], reduction="sum")


class CalibrationEntry(BrickEntry):
    """A brick's fields in a step with calibration texts."""

    calibration: str | None = None
    """Texts of the brick's own task; omitted: the step's."""


class Calibrated(MergeMethod):
    """A merge method that reads texts for each brick: their fields, and the checks that come before any work."""

    bricks: Bricks[CalibrationEntry] | None = None
    """Brick name -> weight, or {weight:, calibration:}; a list of names gives each weight 1; omitted: all with weight 1. Weights are 0 or more, and only their ratios matter."""
    calibration: str | None = None
    """A jsonl of {"prompt":, "completion":} (or response, answer, target) or of {"text":}, relative to the project, for bricks
    that name none of their own."""
    samples: Whole = Field(256, ge=1)
    """Texts read of each file, evenly spaced."""
    max_length: Whole = Field(512, ge=2)
    """Tokens of a text at most."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        not_negative(self.bricks)
        missing = [b for b in self.bricks or () if self.file(b) is None] if self.bricks is not None else ["every brick"]
        if self.calibration is None and missing:
            raise ValueError(f"expected `calibration`, a jsonl of texts, for {', '.join(missing)} or for the step")
        return self

    def file(self, brick: str) -> str | None:
        """The file of a brick's texts."""
        entry = self.entry(brick)
        return (entry.calibration if isinstance(entry, CalibrationEntry) else None) or self.calibration

    def inputs(self) -> list[str]:
        """The files of texts."""
        named = {self.calibration} if self.bricks is None else {self.file(brick) for brick in self.bricks}
        return sorted(file for file in named if file)

    def check(self, project: Path) -> None:
        """Read every file once."""
        for file in self.inputs():
            read_texts(project / file, file)

    def rows(self, context: MergeContext, brick: str) -> tuple[list[Row], str]:
        """A brick's texts as tokens, and the key of what is measured on them with the brick's model."""
        file = self.file(brick)
        assert file is not None
        longest = longest_row(context.base.config, self.max_length)
        rows = encode(read_texts(context.project / file, file, self.samples), context.tokenizer, longest)
        return rows, json_digest(
            [type(self).version, context.keys[brick], file_digest(context.project / file), self.samples, longest]
        )
