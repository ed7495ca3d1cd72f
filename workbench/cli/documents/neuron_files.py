"""Document of `analyze import`."""

from __future__ import annotations

from workbench.cli.documents.document import Document
from workbench.results import Number


class ImportedSet(Document):
    """A set of neurons that was read from a file."""

    function: str
    """Its function."""
    set: str
    """Its directory."""
    size: int
    """Number of its neurons."""
    share: Number
    """Share of the model's neurons."""


class ImportedSetsDocument(Document):
    """Result of `analyze import`."""

    base: str
    """The base, as it was named."""
    digest: str
    """Digest of its weights and configuration."""
    sets: list[ImportedSet]
    """The sets."""
    empty: list[str]
    """Functions without a neuron, which have no set."""
