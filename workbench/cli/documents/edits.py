"""Documents of `edit` and `facts`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from workbench.cli.documents.document import Document
from workbench.results import Number


class SaidShares(Document):
    """Shares of facts that the model says, from 0 to 1."""

    without: Number
    """Share without the edit."""
    before: Number | None
    """Share with the old brick added as a delta; null if it does not fit the model."""
    after: Number
    """Share with the new brick."""


class RebaseDocument(Document):
    """An edit that was solved again on another model."""

    brick: str
    """Directory of the new brick."""
    source: str = Field(alias="from")
    """Directory of the old brick."""
    method: str
    """Edit method."""
    facts: int
    """Number of facts."""
    onto: str
    """Name of the recipe or model that it was solved on."""
    base: str
    """Digest of the base."""
    solved_on: str
    """Key of the weights that it was solved on."""
    kept: dict[str, Any]
    """Field whose value is `auto` -> the old brick's value, which was kept."""
    said: SaidShares
    """Shares of facts that the model says."""
    not_said: list[str]
    """Ids of facts that the model does not say with the new brick."""
    unlisted: list[str]
    """Ids of steps of the recipe that list no bricks, so that they would also merge the new brick."""


class RecoveredShare(Document):
    """Effect of restoring one layer's output at one position."""

    recovered: Number
    """Share of the answer's probability that returns; 0 as with the other subject, 1 as with the true one."""
    interval: tuple[Number, Number] | None
    """95 % interval over facts; null with one fact."""


class TracedPlaces(Document):
    """Effects by position."""

    subject: RecoveredShare
    """All tokens of the subject."""
    subject_last: RecoveredShare
    """Last token of the subject."""
    last: RecoveredShare
    """Last token of the prompt."""


class TracedLayer(Document):
    """Effects of restoring one layer."""

    block: TracedPlaces
    """Output of the layer."""
    feed_forward: TracedPlaces
    """Output of the layer's feed-forward part."""


class TracedFact(Document):
    """A traced fact."""

    id: str
    """Id of the fact."""
    answer: str
    """The model's own next token, as text."""
    clean: Number
    """Probability of the answer with the true subject."""
    corrupted: Number
    """Probability of the answer with another subject."""


class TraceDocument(Document):
    """A causal trace of facts through a model."""

    model: str
    """Name of the model."""
    file: str
    """The facts file."""
    facts: int
    """Number of traced facts."""
    clean: Number
    """Mean probability of the answers with the true subjects."""
    corrupted: Number
    """Mean probability of the answers with other subjects."""
    layers: dict[str, TracedLayer]
    """Layer, from 0 -> effects of restoring it."""
    traced: list[TracedFact]
    """The traced facts."""


class FactFindingDocument(Document):
    """A problem with one line of a facts file."""

    place: str
    """Location of the line, as file:line."""
    kind: str
    """Kind of the problem, such as contradiction, duplicate or known."""
    status: Literal["failed", "warning"]
    """Whether the problem fails the check."""
    found: str
    """Description of the problem."""
    repair: str
    """Advice on how to fix it."""
    fact: str | None
    """Id of the fact; null if the line is not a fact."""
    other: str | None
    """Location of the other fact, if one is involved."""
    similarity: Number | None
    """Similarity of the two facts' questions, from 0 to 1; null unless an encoder compared them."""


class FactsCheckDocument(Document):
    """Checks of a facts file. If it does not pass, the exit code is 3."""

    file: str
    """The facts file."""
    format: str
    """Format of the file: "facts", or the name of a published format."""
    facts: int
    """Number of facts."""
    model: str | None
    """Name of the model whose answers were checked."""
    passed: bool
    """Whether no problem fails the check."""
    encoder: str | None
    """Directory of the encoder that compared wordings; null without one."""
    wording_threshold: Number | None
    """Similarity from which the encoder reports two facts; null without an encoder."""
    counts: dict[str, int]
    """Kind of problem -> number of findings."""
    findings: list[FactFindingDocument]
    """The problems, grouped by kind."""


class SkippedRow(Document):
    """A row that was not converted."""

    place: str
    """Location of the row, as file:line."""
    reason: str
    """Reason for skipping it."""


class FactsImportDocument(Document):
    """Conversion of a published facts dataset."""

    format: str
    """Format of the file."""
    facts: int
    """Number of facts."""
    out: str | None
    """File that was written; null without `--out`."""
    skipped: list[SkippedRow]
    """Rows that were skipped."""
