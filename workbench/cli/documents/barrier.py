"""Document of `brick barrier`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document
from workbench.results import Number


class LinePoint(Document):
    """A model on the line between the two."""

    t: Number
    """Position: 0 is the first model, 1 the second one."""
    loss: Number
    """Mean over texts of the mean loss per predicted token, in nats."""
    low: Number
    """Lower end of the 95 % interval over texts."""
    high: Number
    """Upper end of the interval."""
    above: Number
    """Rise of the loss above the straight line between the losses of the ends."""


class BarrierHeight(Document):
    """The largest rise above the line."""

    value: Number
    """The barrier, in nats; 0 if no point is above the line."""
    low: Number
    """Lower end of the 95 % interval, paired over texts."""
    high: Number
    """Upper end of the interval."""
    t: Number
    """Position of the barrier."""


class BarrierDocument(Document):
    """Loss along the line between two models."""

    first: str
    """The first model."""
    second: str
    """The second model."""
    base: str | None
    """The model that both are bricks of; null if the second one is compared with the first."""
    texts: str
    """File of the texts."""
    items: int
    """Number of texts."""
    tokens: int
    """Number of predicted tokens."""
    points: list[LinePoint]
    """The models, from the first to the second."""
    barrier: BarrierHeight
    """The barrier."""
    verdict: Literal["none", "small", "high"]
    """The verdict on the barrier. "none": linear merging has a chance; "high": it has none; "small": in between, or unclear."""
    says: str
    """The verdict as a sentence."""
