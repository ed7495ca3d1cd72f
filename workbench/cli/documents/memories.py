"""Documents of `memory`."""

from __future__ import annotations

from typing import Any

from workbench.cli.documents.document import Document, OpenDocument, optional
from workbench.results import Number


class MemoryFact(Document):
    """A fact of a memory."""

    id: str
    """Id of the fact."""
    prompt: str
    """The prompt, with its subject."""
    target: str
    """The answer."""
    version: int
    """Version of the memory at which the fact was last stated."""
    source: str
    """"recipe" or "added"."""
    feedback: int
    """Number of recorded uses."""
    credibility: Number
    """Credibility of the fact, from 0 to 1."""
    used: bool
    """Whether the model uses the fact; a fact with low credibility is not used."""


class MemoryDocument(Document):
    """The facts of a memory."""

    version: int
    """Version of the memory."""
    method: str
    """Memory method."""
    facts: list[MemoryFact]
    """The facts, by id."""


class MemoryChange(OpenDocument):
    """A change of one fact of a memory."""

    version: int
    """Version of the memory that the change belongs to."""
    action: str
    """add, update, rm or feedback."""
    id: str
    """Id of the fact."""
    time: str | None = optional()
    """Time of the change (ISO 8601, UTC); null for facts of the recipe."""
    source: str = optional()
    """"recipe" or "added", for facts that were added."""
    fact: dict[str, Any] = optional()
    """The new fact, for the actions add and update."""
    reward: Number = optional()
    """1 if the fact was right in a use, 0 if it was wrong, for the action feedback."""
    similarity: Number = optional()
    """Similarity of the prompt to the fact, from 0 to 1, for the action feedback."""
