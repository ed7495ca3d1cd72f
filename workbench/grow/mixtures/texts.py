"""Base class of growth methods that read texts, and the cache of what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from workbench.ground.files import write_json
from workbench.ground.results import JsonObject
from workbench.models.layout import Model
from workbench.models.texts import TextRow, encode, longest_row, read_texts
from workbench.steps import GrowContext, GrowMethod
from workbench.steps.fields import Whole
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor


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


Data = TypeVar("Data", bound=JsonObject)


def load_measured(context: GrowContext, kind: type[Data]) -> tuple[dict[str, Tensor], Data] | None:
    """Return the tensors and the data that an earlier call has cached; None without them, or if the data are not of this class."""
    from safetensors.torch import load_file

    data = kind.read_cached(context.cache.with_suffix(".json")) if is_whole(context.cache) else None
    return None if data is None else (load_file(context.cache), data)


def save_measured(context: GrowContext, tensors: Mapping[str, Tensor], data: Mapping[str, object]) -> None:
    """Write a measurement to the cache for the next call.

    Raises:
        WorkbenchError: If an input file has changed since.
    """
    context.check_inputs()
    context.cache.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, context.cache)
    write_json(context.cache.with_suffix(".json"), data)
