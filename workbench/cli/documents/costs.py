"""Document of what a configuration costs, in `compare`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document
from workbench.results import Number


class CostsDocument(Document):
    """The costs of a configuration. A number that is not known is null, and `missing` says why."""

    configuration: str
    """Name of the configuration."""
    answer_length: Number | None
    """Mean length of the generated texts."""
    length_unit: Literal["tokens", "words"] | None
    """Unit of `answer_length`: tokens of the model's tokenizer, or words where the stored scores have no tokens."""
    seconds: Number | None
    """Time of scoring all tasks."""
    resumed: bool
    """True if the time leaves out what an interrupted evaluation had done."""
    tokens_per_second: Number | None
    """Tokens of the generated texts per second of generating them."""
    peak_bytes: int | None
    """Largest peak of memory while a task was scored."""
    peak_of: str | None
    """The memory that `peak_bytes` counts: CUDA memory that torch allocated, or resident memory of the process."""
    licences: dict[str, str]
    """License of the base and of every brick; "unknown" if none is stated; empty for imported scores."""
    missing: dict[str, str]
    """Field -> reason why it is null or empty."""
