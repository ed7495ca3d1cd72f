"""Document of `brick advise`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document, Number


class AdvisedBrick(Document):
    """A brick."""

    name: str
    """Name of its directory."""
    path: str
    """Its directory."""
    kind: Literal["adapter", "checkpoint"]
    """The kind of brick."""
    relative_norm: Number
    """Norm of its delta over that of the base's same tensors."""
    weight: Number
    """1 / Σ RV, the weight that `weights: auto` gives it."""


class SharedPrompts(Document):
    """Prompts that the texts of two bricks share."""

    prompts: int
    """Number of shared prompts."""
    different: int
    """Number of those for which the bricks have no answer in common."""
    example: list[str] | None
    """A shared prompt with different answers, and an answer of each brick."""


class BrickPair(Document):
    """Two bricks."""

    one: str
    """A brick."""
    two: str
    """Another brick."""
    rv: Number
    """RV coefficient of their deltas, the mean over the layers' matrices."""
    rv_lowest_layer: Number | None
    """Smallest mean of a layer that one of the two changes."""
    rv_highest_layer: Number | None
    """Largest mean of such a layer."""
    cosine: Number | None
    """Cosine of the deltas."""
    output_cosine: Number | None
    """Mean cosine of what the two add to the outputs of the base's linear layers on their texts; null without --outputs."""
    sign_conflict: Number | None
    """Share of elements with opposite signs, among those where both are nonzero."""
    norm_ratio: Number | None
    """Norm of the first delta over that of the second."""
    shared: SharedPrompts | None
    """Prompts that their texts share; null if one of them has no texts."""


class LayerOverlap(Document):
    """RV coefficients of one layer."""

    layer: int
    """Number of the layer."""
    rv: list[list[Number]]
    """[bricks, bricks], in the order of `bricks`."""


class EarlierScore(Document):
    """A stored configuration that was made from the same bricks."""

    suite: str
    """The suite."""
    name: str
    """Name of the configuration."""
    recipe: str | None
    """Path of its recipe; null for a control."""
    value: Number
    """Mean of the tasks' primary metrics."""
    tasks: int
    """Number of tasks."""
    items: int
    """Number of items of all tasks."""
    of: int
    """Number of stored configurations of these bricks on the suite."""


class AdviceDocument(Document):
    """Advice on merging bricks."""

    base: str
    """The base."""
    bricks: list[AdvisedBrick]
    """The bricks, as named."""
    pairs: list[BrickPair]
    """All pairs of bricks."""
    layers: list[LayerOverlap]
    """Overlaps layer by layer."""
    regime: Literal["single", "same", "contradicting", "far", "opposed", "overlapping", "between", "disjoint"]
    """The relation of the bricks to each other."""
    says: str
    """The regime as a sentence."""
    step: dict[str, Any] | None
    """The recommended step; null if no merge is recommended."""
    reasons: list[str]
    """Reasons for the step, or what to do instead of a merge."""
    unknown: list[str]
    """Sentences on what the advice does not cover, and how to find out."""
    scored_before: list[EarlierScore]
    """The best stored configurations of the same bricks."""
    recipe: str | None
    """The file that was written with --write."""
