"""Document of `brick advise`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document
from workbench.results import Number


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


class LeftOut(Document):
    """A brick that the recommended step leaves out."""

    name: str
    """The brick."""
    because: str
    """Why, as the rest of a sentence that starts with the name."""


class Measured(Document):
    """A number with its interval."""

    value: Number
    """The number."""
    low: Number
    """Lower end of the interval."""
    high: Number
    """Upper end of the interval."""


class OnBrick(Document):
    """A model on the prompts of one brick."""

    brick: str
    """The brick."""
    accuracy: Measured
    """Share of its prompts that the model answers exactly, with a 95 % interval."""


class Tried(Document):
    """A model that was run on the bricks' prompts."""

    name: str
    """Its name."""
    step: dict[str, Any] | None
    """The step that makes it from the base; null for the base."""
    accuracy: Measured
    """Share of all prompts that it answers exactly, with a 95 % interval."""
    bricks: list[OnBrick]
    """The same on the prompts of each brick."""


class Fall(Document):
    """A brick whose skill falls in the advised merge."""

    brick: str
    """The brick."""
    change: Measured
    """Accuracy of the merge minus that of the brick alone, with an interval at 5 % over all bricks (Bonferroni)."""


class MeasuredModels(Document):
    """Models that were run, with --measure."""

    items: int
    """Number of prompts of each brick."""
    base: Tried
    """The base."""
    alone: list[OnBrick]
    """Each brick alone on its own prompts."""
    candidates: list[Tried]
    """Merges of the bricks; empty if nothing could be merged."""
    advised: str | None
    """Name of the advised candidate; null if no merge is recommended."""
    clear: bool
    """True if the prompts decide between the best candidate and the next or the one that the weights suggest."""
    says: str | None
    """The decision as a sentence; null without candidates."""
    falls: list[Fall]
    """Bricks whose skill clearly falls in the advised merge."""


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
    left_out: list[LeftOut]
    """Bricks that the step leaves out: copies, bricks that point against another one, and bricks that change nothing."""
    warnings: list[str]
    """What can spoil any merge of these bricks."""
    sweep: list[Number]
    """Values of lambda that the written recipe compares; empty if it has one configuration."""
    trial: MeasuredModels | None
    """The models that were run; null without --measure."""
    scored_before: list[EarlierScore]
    """The best stored configurations of the same bricks."""
    recipe: str | None
    """The file that was written with --write."""
