"""Document of `analyze decompose`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.analyze import AnalyzedTexts
from workbench.cli.documents.document import Document, optional
from workbench.results import Number


class QualityCurve(Document):
    """Quality of nested sets of bricks, from few bricks to all."""

    shares: list[Number]
    """Share of the bricks in each set."""
    scores: list[Number]
    """Its score: the negative loss in nats per token."""
    floor: Number
    """Score without any brick."""
    quality: list[Number]
    """Share of the full score above the floor that each set keeps."""
    kept: Number
    """Share of the score that defines `least_share`."""
    least_share: Number
    """Least share of the bricks that keeps this share of the score; all larger sets keep it too."""
    area: Number
    """Area under quality against share."""
    order: list[str] = optional()
    """Bricks of a recipe in the order in which they are added."""


class DecomposedFunction(Document):
    """Metrics of one function."""

    function: str
    """The function, or the brick that serves it."""
    coupling: Number | None
    """Mean damage to other functions over the damage to its own; null if undefined."""
    curve: QualityCurve | None
    """Quality on its texts; null if it is undefined."""


class DecompositionPart(Document):
    """Metrics of one decomposition."""

    origin: Literal["customized", "emergent"]
    """Bricks of the recipe, or the model's own sets of neurons."""
    unit: str
    """Kind of part that the shares count: bricks, neurons or experts."""
    parts: int
    """Their number."""
    items: int
    """Number of texts whose loss was measured."""
    scored: str
    """Tokens whose loss counts for the curves: whole or response."""
    coupling: Number | None
    """Median over functions of the mean damage to others over the damage to the own function; null if undefined or unknown."""
    interval: list[Number | None]
    """Its 95 % interval over tasks."""
    dominant_rows: int | None
    """Number of bricks or sets whose own function loses most without them."""
    changes: list[list[Number | None]] | None
    """(PPL without - PPL) / PPL: rows are left out, columns measured."""
    functions: list[DecomposedFunction]
    """Metrics by function."""
    curve: QualityCurve | None
    """Quality as a mean over functions; null if it is undefined."""
    notes: list[str]
    """What is missing, and why."""


class FunctionSpace(Document):
    """Cosines of the changes that bricks make to a model's outputs on the same tokens."""

    names: list[str]
    """The bricks."""
    output: str
    """Outputs that were compared: hidden or update."""
    tokens: int
    """Number of tokens."""
    mean: list[list[Number | None]]
    """Mean over layers; null if a brick changes nothing."""
    layers: list[list[list[Number | None]]]
    """Layer -> cosines."""


class BrickCosinesDocument(Document):
    """Cosines of a recipe's bricks: near 1 they repeat each other, below 0 they are in conflict."""

    names: list[str]
    """The bricks."""
    weight: list[list[Number | None]]
    """Cosine of their deltas; null if two bricks change no common tensor."""
    function: FunctionSpace | None
    """Cosines in function space; null without texts."""


class DecompositionDocument(Document):
    """Result of `analyze decompose`."""

    version: Literal[1]
    """Version of the document."""
    kind: str
    """Kind of analysis."""
    model: str
    """Name of the recipe or model."""
    digest: str
    """Digest of its weights and configuration."""
    data: AnalyzedTexts | None
    """The texts; null without --data."""
    settings: dict[str, Any]
    """Option -> its value."""
    decompositions: list[DecompositionPart]
    """The recipe's bricks and the model's own sets of neurons, as far as they are known."""
    cosines: BrickCosinesDocument | None
    """Redundancy and conflict of the recipe's bricks; null for fewer than two."""
