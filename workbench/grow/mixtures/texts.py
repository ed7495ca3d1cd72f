"""Base class of growth methods that read texts."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from workbench.models.layout import Model
from workbench.models.texts import TextRow, encode, longest_row, read_texts
from workbench.steps import GrowContext, GrowMethod
from workbench.steps.fields import Whole


class TextMethod(GrowMethod):
    """A growth method that runs texts through the model: the shared fields and checks."""

    version = 2  # prompt and answer are tokenized as one text

    calibration: str | None = None
    """JSONL file of texts, relative to the project: {"text":} or {"prompt":, "completion":} a line."""
    samples: Whole = Field(256, ge=1)
    """Largest number of texts read from a file, evenly spaced over the file."""
    max_length: Whole = Field(512, ge=2)
    """Largest number of tokens of a text. Longer texts lose their end; longer prompts lose their start."""

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        return [self.calibration] if self.calibration else []

    def check_inputs(self, project: Path) -> None:
        """Check every line of the files.

        Raises:
            WorkbenchError: If a line is not a valid text.
        """
        for file in self.inputs():
            read_texts(project / file, file)

    def rows(self, file: str, model: Model, context: GrowContext) -> list[TextRow]:
        """Return the texts of a file as tokens."""
        texts = read_texts(context.project / file, file, self.samples)
        return encode(texts, context.tokenizer, longest_row(model.config, self.max_length))
