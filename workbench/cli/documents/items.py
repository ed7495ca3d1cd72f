"""Document of `scores items`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document
from workbench.results import Number


class AnswerDocument(Document):
    """A configuration's answer to an item."""

    score: Number | list[Number] | None
    """Score by the task's primary metric; numerator and weight for a ratio of sums; contribution to a metric of all items together."""
    response: str | None
    """Generated text; null if the task does not generate any."""
    picked: int | None
    """Index of the choice that the model answers; null for a task without choices."""
    loglikelihoods: list[Number] | None
    """Log-likelihoods of the choices or texts, in nats; null for generated text."""


class ItemDocument(Document):
    """An item with the answers of two configurations."""

    task: str
    """Name of the task."""
    id: str
    """Name of the item within the task."""
    cluster: str | int | None
    """Cluster of the item."""
    metric: str
    """Primary metric of the task."""
    prompt: str
    """Prompt that both were given."""
    choices: list[str] | None
    """Choices of the item, if it has any."""
    gold: str | int | list[int] | None
    """The right answer: a text, or the index of the right choice, or several indices."""
    change: Literal["won", "lost", "same"]
    """Change from the first configuration to the second one: the item is won, lost, or has the same score."""
    first: AnswerDocument
    """Answer of the first configuration."""
    second: AnswerDocument
    """Answer of the second configuration."""


class ItemsDocument(Document):
    """Answers of two configurations, item by item."""

    first: str
    """Name of the first configuration."""
    second: str
    """Name of the second configuration."""
    items: int
    """Number of items of the tasks that were asked for."""
    won: int
    """Number of items with a better score of the second configuration."""
    lost: int
    """Number of items with a worse score of the second configuration."""
    same: int
    """Number of items with the same score."""
    shown: list[ItemDocument]
    """The items that the options select."""
