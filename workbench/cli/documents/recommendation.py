"""Document of the recommendation that `compare` gives."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.document import Document
from workbench.results import Number


class MeanDifferenceDocument(Document):
    """The difference of two configurations' means over skills, tested in the family of pairs."""

    configuration: str
    """Name of the configuration."""
    against: str
    """Name of the configuration that it is compared with."""
    diff: Number
    """Mean of the first minus mean of the second, corrected for chance."""
    low: Number | None
    """Lower end of the interval at the family's critical value; null if it is infinite."""
    high: Number | None
    """Upper end of this interval."""
    p: Number
    """p value adjusted for the family."""
    verdict: Literal["better", "worse", "equivalent", "cannot tell", "no item changed"]
    """The verdict on the first configuration."""
    needs: int | None
    """Approximate number of items over the skill tasks that would decide "cannot tell"; null for other verdicts."""
    reason: str | None
    """Reason of "cannot tell" if more items of the same clusters would not help; null otherwise."""


class CandidateDocument(Document):
    """A configuration, brick, average or base that was scored on all skill tasks."""

    configuration: str
    """Name of the configuration."""
    role: Literal["configuration", "brick", "average", "base"]
    """Its role; bricks, averages and the base are controls."""
    mean: Number
    """Mean over skills, corrected for chance."""
    guarded: Literal["safe", "not shown safe", "worse", "no guarded task", "baseline"]
    """Its worst verdict over all guarded tasks, or why it has none."""
    against_baseline: MeanDifferenceDocument | None
    """Difference from the baseline; null for the baseline itself."""
    against_best: MeanDifferenceDocument | None
    """Difference from the candidate with the highest mean; null for that one."""
    form: str | None
    """Form in which `run` writes it: "checkpoint", "adapter" or "configuration"; null if not known."""
    bytes: int | None
    """Bytes that `run` writes, or those of the weights as a checkpoint; null if not known."""
    bricks: int
    """Number of bricks that it is made from."""


class PairFamily(Document):
    """The families of pairs that the recommendation rests on: pairs with the baseline, and all others."""

    members: int
    """Number of members: the candidates, the baseline, and what was scored before on the same items."""
    looked_at: int
    """Number of members that were scored before on the same items and are not in the comparison."""
    pairs: int
    """Number of pairs."""
    alpha: Number
    """Error rate of the family."""
    text: str
    """Description."""


class RecommendationDocument(Document):
    """The configuration to ship with the reason, or why none can be recommended and what would help."""

    configuration: str | None
    """Name of the recommended configuration; null if none can be recommended."""
    closest: str | None
    """Name of the candidate that misses least; null if one is recommended, or if none was tested."""
    cause: Literal["unsafe", "not shown safe", "not better", "too few clusters", "no mean", "not scored", "same weights"] | None
    """Why none is recommended; null if one is."""
    baseline: str
    """Name of the configuration that a recommended one has to be better than, and safe against."""
    text: str
    """The recommendation in one sentence."""
    details: list[str]
    """Sentences on the configurations beside it."""
    help: list[str]
    """Sentences on what would help if none is recommended."""
    leaders: list[str]
    """The candidate with the highest mean and all that are not shown to be worse than it, the highest mean first."""
    candidates: list[CandidateDocument]
    """All candidates, the highest mean first; empty if none was tested."""
    pairs: list[MeanDifferenceDocument]
    """Differences from the recommended, or closest, candidate of the other leaders and of all that are not shown to be worse than it."""
    family: PairFamily
    """The families of pairs."""
