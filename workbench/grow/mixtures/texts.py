"""Grow methods that read texts."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from workbench.models.layout import Model
from workbench.models.texts import TextRow, encode, longest_row, read_texts
from workbench.steps import GrowContext, GrowMethod
from workbench.steps.fields import Whole


class TextMethod(GrowMethod):
    """A growth that runs texts through the model: fields and files that such methods share."""

    version = 2  # prompt and answer are tokenized as one text

    calibration: str | None = None
    """A jsonl of {"text":} or {"prompt":, "completion":}, relative to the project."""
    samples: Whole = Field(256, ge=1)
    """Texts read of a file, evenly spaced."""
    max_length: Whole = Field(512, ge=2)
    """Tokens of a text at most."""

    def inputs(self) -> list[str]:
        """The files of texts."""
        return [self.calibration] if self.calibration else []

    def check_inputs(self, project: Path) -> None:
        """Errors: a line that is no text."""
        for file in self.inputs():
            read_texts(project / file, file)

    def rows(self, file: str, model: Model, context: GrowContext) -> list[TextRow]:
        """The texts of a file as tokens."""
        texts = read_texts(context.project / file, file, self.samples)
        return encode(texts, context.tokenizer, longest_row(model.config, self.max_length))
