"""Calibration texts: what data-driven merge methods read, as users write it, and as batches of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from workbench.files import file_digest, json_digest
from workbench.identity import unchanged
from workbench.merge.measuring.least_squares import not_negative
from workbench.models.texts import TextRow, encode, longest_row, read_texts
from workbench.steps import MergeContext, MergeMethod
from workbench.steps.fields import BrickEntry, Bricks, Whole

if TYPE_CHECKING:
    pass


class CalibrationEntry(BrickEntry):
    """A brick's fields in a step with calibration texts."""

    calibration: str | None = None
    """Texts of the brick's own task; omitted: the step's."""


class Calibrated(MergeMethod):
    """A merge method that reads texts for each brick: their fields, and the checks that come before any work."""

    version = 3  # prompt and answer are tokenized as one text

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

    def check_inputs(self, project: Path) -> None:
        """Read every file once."""
        for file in self.inputs():
            read_texts(project / file, file)

    def rows(self, context: MergeContext, brick: str) -> tuple[list[TextRow], str]:
        """A brick's texts as tokens, and the key of what is measured on them with the brick's model."""
        file = self.file(brick)
        assert file is not None
        longest = longest_row(context.base.config, self.max_length)
        with unchanged(context.project / file):  # the texts that are read are those that the key is made of
            rows = encode(read_texts(context.project / file, file, self.samples), context.tokenizer, longest)
            content = file_digest(context.project / file)
        return rows, json_digest([type(self).version, context.keys[brick], content, self.samples, longest])
