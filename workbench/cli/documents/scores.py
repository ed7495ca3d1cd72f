"""Documents of `eval`, `compare` and `scores`."""

from __future__ import annotations

from typing import Literal

from workbench.cli.documents.costs import CostsDocument
from workbench.cli.documents.document import Document, LeftOutDocument, OpenDocument, optional
from workbench.cli.documents.recommendation import RecommendationDocument
from workbench.cli.documents.sweeps import SweepDocument
from workbench.results import Number


class MetricScore(Document):
    """A configuration's score by one metric, with its 95 % interval."""

    value: Number
    """Score in the metric's units; a share from 0 to 1 for accuracies."""
    low: Number
    """Lower end of the interval."""
    high: Number
    """Upper end of the interval."""


class TaskScore(OpenDocument):
    """Scores on one task: `n`, and one further field for each metric, named after the metric."""

    __pydantic_extra__: dict[str, MetricScore]

    n: int
    """Number of items."""


class GroupScore(Document):
    """The mean of a metric over the tasks of a group, as lm-eval aggregates it."""

    group: str
    """Name of the group."""
    alias: str
    """Name of the group in tables."""
    metric: str
    """Metric of the tasks."""
    filter: str
    """lm-eval's filter of the responses; "none" for responses as they are."""
    value: Number
    """Mean of the metric."""
    weighted: bool
    """Whether tasks are weighted by their number of items."""
    tasks: int
    """Number of tasks that have the metric."""
    n: int
    """Number of items of these tasks."""


class ConfigurationScores(Document):
    """The scores of one configuration."""

    name: str
    """Name of the configuration."""
    digest: str
    """Identity of the configuration: its weights, generation settings and tokenizer."""
    weights: str
    """Digest of the configuration's weights."""
    tasks: dict[str, TaskScore]
    """Task -> scores."""
    groups: list[GroupScore] = optional()
    """Aggregates over groups of tasks, if the suite lists a group."""


class EvalDocument(Document):
    """Scores on one suite. `eval` prints a list of these documents if there are several suites."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan: tasks, items, prompts, scorer, dtype and batch size. Equal plans give comparable scores."""
    configurations: list[ConfigurationScores]
    """Scored configurations, controls first."""
    left_out: list[LeftOutDocument] = optional()
    """Configurations that were skipped, if there are any. The exit code is then 1."""


class CompanionDifference(Document):
    """The difference of a second metric on the same items; it does not decide a verdict."""

    metric: str
    """Name of the metric."""
    unit: str
    """Unit of its values."""
    value: Number | None
    """The configuration's score."""
    baseline_value: Number | None
    """The baseline's score."""
    diff: Number | None
    """Configuration minus baseline."""
    low: Number | None
    """Lower end of the unadjusted 95 % interval of the difference."""
    high: Number | None
    """Upper end of the interval."""
    p: Number | None
    """Two-sided p value of "no difference", not adjusted."""


class DifferenceRow(Document):
    """One configuration against the baseline on one task or contrast. An infinite or undefined number is null."""

    configuration: str
    """Name of the configuration."""
    role: str
    """"configuration" for a named one; "base", "brick", "average", "memory", "finetune" or "adapter" for a control."""
    task: str
    """Name of the task or contrast."""
    metric: str
    """Primary metric of the task."""
    value: Number | None
    """The configuration's score in the metric's units."""
    baseline_value: Number | None
    """The baseline's score."""
    diff: Number | None
    """Configuration minus baseline."""
    low: Number | None
    """Lower end of the unadjusted 95 % interval of the difference."""
    high: Number | None
    """Upper end of this interval."""
    low_adj: Number | None
    """Lower end of the interval adjusted for the family of comparisons."""
    high_adj: Number | None
    """Upper end of this interval."""
    p: Number | None
    """Two-sided p value of "no difference", not adjusted."""
    p_adj: Number | None
    """p value adjusted for the family."""
    n: int
    """Number of items that both have."""
    clusters: int
    """Number of clusters of these items."""
    mde: Number | None
    """Difference that would be detected with 80 % power at the adjusted level; null if the differences have no spread."""
    needs: int | None
    """Approximate number of items that would decide an undecided row; null for other rows."""
    verdict: Literal["better", "worse", "equivalent", "cannot tell", "safe", "not shown safe", "no item changed"]
    """The verdict. "safe" and "not shown safe" are for guarded tasks."""
    reason: str | None
    """Reason of the verdicts "cannot tell" and "not shown safe"."""
    wins: int
    """Number of items that got better."""
    losses: int
    """Number of items that got worse."""
    lower: bool
    """Whether lower scores are better."""
    ratio: bool
    """Whether the metric is computed from all items together, not a mean of scores of items."""
    family: str
    """Family of comparisons that the row is tested in: "compared", "guarded" or "controls"."""
    tolerance: Number | None
    """Largest loss on a guarded task that counts as safe, in the metric's units; null for other tasks."""
    companion: CompanionDifference | None
    """Difference of the margin of the gold choice, for multiple-choice tasks."""


class Share(Document):
    """A share of items with its 95 % interval."""

    value: Number
    """Share from 0 to 1."""
    low: Number
    """Lower end of the interval."""
    high: Number
    """Upper end of the interval."""


class RoutedTask(Document):
    """The bricks that answered the items of a task in a routed configuration."""

    configuration: str
    """Name of the configuration."""
    task: str
    """Name of the task."""
    owner: str | None
    """The configuration's brick that teaches the task; null if the base should answer."""
    n: int
    """Number of items."""
    answered_by: dict[str, int]
    """Bricks, or "base" -> number of items, the most frequent first."""
    own: Share
    """Items that the task's own brick answered."""
    base: Share
    """Items that the base answered."""
    other: Share
    """Items that another brick answered: false routing."""


class RoutedBeside(Document):
    """A routed configuration beside the merge of its bricks with the best mean over skills."""

    configuration: str
    """Name of the routed configuration."""
    merge: str
    """Name of the merge."""
    merges: int
    """Number of merges that it was chosen among."""
    value: Number
    """Mean chance-corrected score of the routed configuration over skills."""
    merge_value: Number
    """The same of the merge."""
    diff: Number
    """Difference of the two, routed minus merge."""
    low: Number
    """Lower end of its 95 % interval."""
    high: Number
    """Upper end of its 95 % interval."""
    verdict: str
    """"better", "worse", "equivalent", "cannot tell" or "no item changed", of the routed configuration."""
    bricks: int
    """Number of bricks that the routed configuration keeps."""
    seconds: Number
    """Time that scoring the routed configuration took."""
    merge_seconds: Number
    """Time that scoring the merge took."""


class RoutingComparison(Document):
    """Routed configurations in a comparison."""

    tasks: list[RoutedTask]
    """One entry for each routed configuration and each task."""
    beside: list[RoutedBeside]
    """One entry for each routed configuration that stands beside a merge of its bricks."""


class CompareDocument(Document):
    """Comparison of stored scores with a baseline."""

    baseline: str
    """Name of the baseline."""
    rows: list[DifferenceRow]
    """One row for each configuration and each task or contrast."""
    costs: list[CostsDocument] = optional()
    """Costs of the compared configurations: length of answers, time and memory of scoring, licenses."""
    recommendation: RecommendationDocument | None = optional()
    """The recommendation says which configuration to ship and why. It is absent if only controls are compared."""
    sweeps: list[SweepDocument] = optional()
    """Sweeps among the configurations, if there are any."""
    routing: RoutingComparison | None = optional()
    """Which bricks answered in routed configurations, if there are any."""
    left_out: list[LeftOutDocument] = optional()
    """Configurations that were skipped, if there are any."""


class StoredConfiguration(Document):
    """A configuration with scores under a plan."""

    name: str
    """Name of the configuration."""
    role: str
    """"configuration", "base", "brick", "average", "memory", "finetune" or "adapter"."""
    digest: str
    """Digest under which its scores are stored."""
    created: str
    """Time of the scoring (ISO 8601, UTC)."""
    aliases: list[str]
    """Other names of the same weights."""


class StoredPlan(Document):
    """A suite and plan with stored scores."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan."""
    imported: bool
    """Whether the scores were imported from lm-eval."""
    scorer: str
    """Scorer of log-likelihoods."""
    dtype: str | None
    """Dtype of the scored models; null for imported scores."""
    batch_size: int | None
    """Requests per forward pass; null for imported scores."""
    partial: bool
    """Whether `--limit` cut the items."""
    tasks: dict[str, int]
    """Task -> number of items."""
    created: str
    """Time of the newest scores (ISO 8601, UTC); empty without scores."""
    bytes: int
    """Size of the plan's folder in bytes."""
    unfinished: int
    """Number of interrupted evaluations."""
    folder: str
    """Name of the plan's folder in the score store."""
    outdated: str | None
    """Why the scores are not compared with those of this version; null if they are."""
    configurations: list[StoredConfiguration]
    """Scored configurations, the oldest first."""


class ImportedScores(Document):
    """A configuration imported from lm-eval's sample files."""

    suite: str
    """Suite that the scores are stored under."""
    plan: str
    """Digest of the plan; equal for runs on the same documents and prompts."""
    name: str
    """Name of the configuration."""
    digest: str
    """Digest of its name and numbers."""
    new: bool
    """False if the store already had the same numbers under this name."""
    tasks: dict[str, int]
    """Task -> number of items."""


class PulledConfiguration(Document):
    """A configuration's scores in the other store."""

    suite: str
    """Name of the suite."""
    plan: str
    """Digest of the plan."""
    name: str
    """Name of the configuration."""
    key: str
    """Digest under which the scores are stored."""
    status: Literal["pulled", "same", "named"]
    """Outcome: the scores were taken, were here already, or were here and got names of the other store."""


class RefusedScores(Document):
    """A file of the other store that was not taken."""

    file: str
    """The file, below the other store."""
    reason: str
    """Reason for not taking it."""


class PulledScores(Document):
    """The result of merging another score store."""

    source: str
    """Folder of the other store."""
    dry_run: bool
    """True if nothing was written."""
    plans: list[str]
    """Folders of the plans that this store did not have."""
    documents: list[PulledConfiguration]
    """Scores that were taken, or were here already."""
    refused: list[RefusedScores]
    """Files that were not taken; the command then exits with 1."""
    notes: list[str]
    """Differences that change no scores, such as other versions of a library."""
