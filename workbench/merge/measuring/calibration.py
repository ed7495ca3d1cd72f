"""Calibration texts of data-driven merge methods: their recipe fields, and their texts as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from workbench.files import file_digest, json_digest
from workbench.identity import open_unchanged
from workbench.merge.measuring.least_squares import not_negative
from workbench.models.layout import Model
from workbench.models.texts import BATCH_TOKENS, TextRow, encode, longest_row, read_texts
from workbench.steps import MergeContext, MergeMethod
from workbench.steps.fields import BrickEntry, Bricks, Whole


class CalibrationEntry(BrickEntry):
    """A brick's fields in a step that reads calibration texts."""

    calibration: str | None = None
    """JSONL file of texts from the brick's own task; if omitted, the step's `calibration`."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what a method holds while it runs a model layer by layer, for `plan`.

    Attributes:
        outside: Bytes of the parameters outside the layers, in float32.
        layer: Bytes of one layer in float32.
        squares: Numbers in one square matrix for each width of the layer's inputs.
        hidden: Bytes of the hidden states of one brick's texts, if these are as long as the fields allow.
    """

    outside: int
    layer: int
    squares: int
    hidden: int


class ReadsTexts(MergeMethod):
    """Base class of merge methods that run models on texts: the fields, and the checks before any work."""

    version = 3  # prompt and answer are tokenized as one text

    bricks: Any = None  # declared here to come before the other fields in the docs; subclasses give it its type
    calibration: str | None = None
    """JSONL file of texts, relative to the project: {"prompt":, "completion":} (or response, answer, target) or {"text":} a line."""
    samples: Whole = Field(256, ge=1)
    """Largest number of texts read from each file, evenly spaced over the file."""
    max_length: Whole = Field(512, ge=2)
    """Largest number of tokens of a text. Longer texts lose their end; longer prompts lose their start."""

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        return [self.calibration] if self.calibration else []

    def check_inputs(self, project: Path) -> None:
        """Read every file once, so that errors in it appear before any work."""
        for file in self.inputs():
            read_texts(project / file, file)

    def sizes(self, model: Model) -> Sizes:
        """Return the sizes of a layer-by-layer pass over the texts."""
        layout, specs = model.layout, model.weights.specs
        layer = [spec for name, spec in specs.items() if layout.layer(name) == 0]
        outside = sum(4 * spec.numel for name, spec in specs.items() if layout.layer(name) is None)
        widths = {spec.cols for spec in layer if len(spec.shape) == 2}
        tokens = self.samples * min(self.max_length, 512) + BATCH_TOKENS
        squares = sum(width**2 for width in widths)
        return Sizes(outside, sum(4 * spec.numel for spec in layer), squares, 4 * tokens * min(widths, default=1))

    def rows_of(self, file: str, context: MergeContext, brick: str) -> tuple[list[TextRow], str]:
        """Return the texts of a file as tokens, and the cache key of what a brick's model ("": the base) measures on them."""
        longest = longest_row(context.base.config, self.max_length)
        with open_unchanged(context.project / file):  # the cache key must describe the texts that were read
            rows = encode(read_texts(context.project / file, file, self.samples), context.tokenizer, longest)
            content = file_digest(context.project / file)
        return rows, json_digest([self.code_key(), context.keys[brick], content, self.samples, longest])


class Calibrated(ReadsTexts):
    """Base class of merge methods that run each brick's model on texts of its own task."""

    bricks: Bricks[CalibrationEntry] | None = None
    """Mapping of brick name to weight, or to {weight:, calibration:}. A list of names gives each brick weight 1; if omitted, all
    bricks get weight 1. Weights must be 0 or more, and only their ratios matter."""
    calibration: str | None = None
    """JSONL file of texts, relative to the project, for bricks without a file of their own: {"prompt":, "completion":} (or
    response, answer, target) or {"text":} a line."""

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        not_negative(self.bricks)
        missing = [b for b in self.bricks or () if self.file(b) is None] if self.bricks is not None else ["every brick"]
        if self.calibration is None and missing:
            raise ValueError(f"expected `calibration`, a JSONL file of texts, for {', '.join(missing)} or for the step")
        return self

    def file(self, brick: str) -> str | None:
        """Return the file of a brick's texts: the brick's own, or the step's."""
        entry = self.entry(brick)
        return (entry.calibration if isinstance(entry, CalibrationEntry) else None) or self.calibration

    @property
    def count(self) -> int:
        """Number of listed bricks; 2 if the step takes all of them."""
        return len(self.bricks) if self.bricks else 2

    def shared(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield each file of texts that stands for several bricks, with the bricks' names."""
        for file in self.inputs():
            if len(bricks := [name for name in names if self.file(name) == file]) > 1:
                yield file, ", ".join(bricks)

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        files = {self.calibration} if self.bricks is None else {self.file(brick) for brick in self.bricks}
        return sorted(file for file in files if file)

    def rows(self, context: MergeContext, brick: str) -> tuple[list[TextRow], str]:
        """Return a brick's texts as tokens, and the cache key of what the brick's model measures on them."""
        file = self.file(brick)
        assert file is not None
        return self.rows_of(file, context, brick)
