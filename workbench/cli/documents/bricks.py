"""Documents of `brick`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.bricks.neuron_sets import ShownNeurons
from workbench.cli.documents.document import Document, optional
from workbench.results import Number


class CardBase(Document):
    """The base that a brick was made on."""

    id: str
    """Directory or hub id of the base."""
    title: str | None
    """Readable name of the base."""
    digest: str | None
    """Digest of the base's weights and configuration when the brick was made."""
    aliases: list[str]
    """Other hub ids, directories or digests of the same base."""


class CardScore(Document):
    """A score of the brick alone on its base, on held-out items."""

    task: str
    """Name of the task."""
    metric: str
    """Name of the metric."""
    n: int
    """Number of items."""
    value: Number
    """Score in the metric's units."""
    low: Number
    """Lower end of the 95 % interval."""
    high: Number
    """Upper end of the interval."""
    base_value: Number | None
    """The base's score on the same items."""


class DeltaMeasures(Document):
    """Measures of a delta over one or more tensors."""

    norm: Number
    """Norm of the delta."""
    relative: Number | None
    """Norm of the delta over the norm of the base's tensors; null if the base's tensors are zero."""
    zeros: Number | None
    """Share of elements of the delta that are exactly zero, from 0 to 1."""
    elements: int
    """Number of elements."""


class OtherBrick(DeltaMeasures):
    """Measures of another brick's delta, and of its relation to the shown brick's."""

    cosine: Number | None
    """Cosine of the two deltas."""
    conflict: Number | None
    """Share of elements with opposite signs among those that both bricks change."""
    overlap_out: Number | None
    """Overlap of the output subspaces, from 0 to 1."""
    overlap_in: Number | None
    """Overlap of the input subspaces, from 0 to 1."""
    overlap: Number | None
    """Mean of both overlaps."""
    chance: Number | None
    """Overlap that unrelated subspaces of the same sizes have on average."""


class Sums(DeltaMeasures):
    """Measures of the shown brick's delta, compared with other bricks."""

    others: dict[str, OtherBrick]
    """Other brick -> its measures; empty if no other brick is named."""


class LayerMeasures(Sums):
    """Measures of one layer."""

    layer: int | None
    """The layer, from 0; null for the tensors outside the layers."""


class CellMeasures(LayerMeasures):
    """Measures of one kind of module in one layer."""

    kind: str
    """Name of the module within its layer, or the tensor's name outside the layers."""


class TensorMeasures(Sums):
    """Measures of one tensor."""

    name: str
    """Name of the tensor."""


class BrickMeasures(Document):
    """Measures of a brick's delta on its base."""

    total: Sums
    """Measures over all tensors."""
    layers: list[LayerMeasures]
    """Measures by layer."""
    cells: list[CellMeasures]
    """Measures by layer and kind of module."""
    tensors: list[TensorMeasures]
    """Measures by tensor."""


class CardRouting(Document):
    """Statistics of the brick's calibration prompts beside its card."""

    file: str
    """File beside the card."""
    digest: str
    """Digest of the file's tensors."""
    base: str
    """Digest of the weights of the base that was run."""
    tokenizer: str
    """Digest of its tokenizer."""
    layer: int
    """Number of decoder blocks whose output was pooled."""
    window: int
    """Number of last tokens that were pooled."""
    pooling: int
    """Version of the pooling."""
    prompts: int
    """Number of prompts, without their copies."""
    source: str
    """File of the prompts."""


class BrickDocument(Document):
    """A brick's card. A brick without a card has only `name` and `kind`."""

    version: Literal[1] = optional()
    """Version of the card's format."""
    name: str
    """Name of the brick."""
    kind: str
    """adapter, checkpoint, edit or neurons."""
    skill: str = optional()
    """One line that describes the skill that the brick adds."""
    base: CardBase = optional()
    """The base that the brick was made on."""
    files: str = optional()
    """Directory of the weights, relative to the card."""
    digest: str | None = optional()
    """Digest of the weights."""
    prompt_format: str = optional()
    """Format of the brick's prompts."""
    generator: str | None = optional()
    """Program that generated the training data."""
    licence: str | None = optional()
    """License of the weights and of the training data."""
    data_licences: dict[str, str] = optional()
    """Training data set -> its license, for data sets whose license differs from `licence`."""
    training: dict[str, Any] = optional()
    """Settings and measurements of the training."""
    extraction: dict[str, Any] = optional()
    """Record of the extraction from a checkpoint."""
    transplant: dict[str, Any] = optional()
    """Record of the transplant from another model."""
    scores: list[CardScore] = optional()
    """Scores of the brick alone."""
    functions: list[str] = optional()
    """Functions that a set of neurons serves."""
    routing: CardRouting | None = optional()
    """Statistics for routers; null if none were measured."""
    axes: dict[str, str] = optional()
    """Axis (origin, granularity, computation, routing, aggregation, training) -> the brick's value."""


class ShownBrick(BrickDocument):
    """A brick's card and the measures of its delta, or the neurons of a set."""

    neurons: ShownNeurons = optional()
    """The neurons of a set; absent for other bricks."""
    overlap: dict[str, Number] = optional()
    """Other set -> share of the neurons that are in both; absent if no other set is named."""
    delta: BrickMeasures = optional()
    """Measures of the delta; absent with `--card`, or if the brick could not be measured."""


class ExtractedTensor(Document):
    """The low-rank update of one tensor."""

    rank: int
    """Rank of the update."""
    norm: Number
    """Norm of the tensor's delta."""
    error: Number
    """Norm of delta minus update, over the norm of the delta."""
    rounding: Number
    """Error from rounding the fine-tune's weights, over the norm of the delta; no rank gets below it."""


class ExtractDocument(Document):
    """An adapter extracted from a fine-tuned checkpoint. All fields but `adapter` are also written to extract.json."""

    adapter: str
    """Directory of the adapter."""
    checkpoint: str
    """Directory or hub id of the checkpoint."""
    base: str
    """Directory or hub id of the base."""
    tensors: dict[str, ExtractedTensor]
    """Tensor -> its update."""
    whole: list[str]
    """Tensors that are saved whole."""
    dropped: list[str]
    """Tensors whose change is dropped."""
    norm: Number
    """Norm of all updates together."""
    error: Number
    """Relative error of all updates together; a dropped tensor counts as lost."""
    rounding: Number
    """Relative rounding error of all updates together."""
    rank: int
    """Largest rank."""
    uniform: bool
    """Whether all updates have the same rank."""
    plain: bool
    """Whether the adapter has low-rank updates only, so that every LoRA loader reads it."""
    digest: str
    """Digest of the adapter's files."""
    digests: dict[str, str]
    """Name of a tensor in the adapter's file -> digest."""
    parameters: int
    """Number of parameters of the adapter."""
    bytes: int
    """Size of the adapter's tensors in bytes."""
    notes: list[str] = optional()
    """Notes on tensors that differ from the base in type."""
