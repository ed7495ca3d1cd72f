"""Document of `brick transplant`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document, optional
from workbench.results import Number


class CommonPositions(Document):
    """Positions of the texts at which both models have read the same text."""

    common: int
    """Number of common positions, without the first position of each text."""
    held_out: int
    """How many of them belong to held-out texts."""
    share: Number
    """Share of the positions of the shorter reading of each text, from 0 to 1."""


class CarriedLayer(Document):
    """A layer of the target."""

    layer: int
    """The layer."""
    sources: list[int]
    """Layers of the source whose updates it takes; several are averaged."""
    modules: list[str]
    """Modules that take an update."""
    matched: Number | None
    """Mean correlation of matched units on held-out texts; null without texts."""
    under: Number | None
    """Share of units with a correlation below 0.2, from 0 to 1; null without texts."""
    units: int | None
    """Number of units, of all inputs and outputs of these modules; null without texts."""


class NotCarried(Document):
    """An update that no layer of the target takes."""

    tensor: str
    """Tensor of the source."""
    reason: str
    """The reason."""


class MatchDocument(Document):
    """The match beside its chance level, on the same layers."""

    matched: Number
    """Mean correlation of matched units on held-out texts."""
    chance: Number
    """The same with exchanged tokens: mean of the controls."""
    controls: list[Number]
    """The same for each control."""
    layers: list[int]
    """Layers of the target that were compared."""
    above: bool
    """True if the match is above chance."""
    criterion: str
    """What counts as above chance."""


class CarriedTraining(Document):
    """Training after the transplant."""

    steps: int
    """Number of steps."""
    learning_rate: Number
    """The learning rate."""
    objective: Literal["source", "texts"]
    """`source`: the distributions of the source with its brick, for models that read the same tokens; `texts`: the texts themselves."""
    first: Number
    """Loss of the first step, in nats per learned token."""
    last: Number
    """Loss of the last step."""


class CarriedLoss(Document):
    """Mean loss per learned token on held-out texts, in nats of each model's own tokens."""

    texts: int
    """Number of held-out texts."""
    tokens: int
    """Number of learned tokens of the target."""
    source: Number
    """The source alone."""
    source_with_brick: Number
    """The source with its brick."""
    before: Number
    """The target alone."""
    after: Number
    """The target with the carried adapter, before training."""
    trained: Number = optional()
    """The target with the carried adapter after training."""


class CarriedDocument(Document):
    """An adapter that was carried to another model."""

    adapter: str
    """Directory of the new adapter."""
    brick: str
    """The brick."""
    from_base: str
    """The model that it was trained on."""
    to: str
    """The target."""
    by: Literal["copy", "assign", "ridge"]
    """How units were matched."""
    layer_rule: Literal["same", "skip", "avg", "map"]
    """How layers were matched."""
    texts: str | None
    """File of the texts; null without texts."""
    positions: CommonPositions | None
    """The texts' common positions; null without texts."""
    modules: int
    """Number of modules that take an update."""
    rank: int
    """Largest rank of an update."""
    left_out: int
    """Number of updates that are not carried."""
    layers: list[CarriedLayer]
    """The layers of the target that take updates."""
    not_carried: list[NotCarried]
    """The updates that are not carried."""
    match: MatchDocument | None
    """The match beside its chance level; null without texts."""
    forced: bool
    """True if --force was given."""
    training: CarriedTraining = optional()
    """Training after the transplant, with --steps."""
    loss: CarriedLoss = optional()
    """Losses, with texts."""
    notes: list[str]
    """Warnings."""
