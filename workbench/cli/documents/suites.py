"""Documents of `suite`."""

from __future__ import annotations

from typing import Any, Literal

from workbench.cli.documents.document import Document, OpenDocument, optional
from workbench.results import Number


class SuiteRow(Document):
    """A suite of the project."""

    suite: str
    """Name of the suite."""
    tasks: list[str]
    """Its tasks."""
    description: str
    """Description of the suite."""
    error: str | None
    """Error, if the suite cannot be read."""


class SuiteTask(Document):
    """A task of a suite."""

    n: int
    """Number of items."""
    kind: str
    """lm-eval's output type, such as multiple_choice or generate_until."""
    metrics: list[str]
    """Metrics of the task."""
    primary: str
    """Metric that is compared."""
    lower: list[str]
    """Metrics for which lower is better."""
    ratios: dict[str, str]
    """Metric that is not a mean over items -> lm-eval's aggregation."""
    filters: list[str]
    """lm-eval's filters of the responses."""
    clusters: int
    """Number of clusters: items that belong together."""
    cluster: str
    """Field of the documents that names an item's cluster."""
    role: str
    """skill, retention, guarded or other."""
    chance: Number | None
    """Score of guessing; null if it depends on the choices of the scored items."""
    owner: str | None
    """Brick that teaches the task."""
    bundled: bool
    """Whether lm-eval bundles the task; false for a task of the project."""


class SuiteDocument(Document):
    """A suite and its plan."""

    version: Literal[1]
    """Version of the format."""
    suite: dict[str, Any]
    """All fields of the suite file, with their defaults."""
    format: str | None = None
    """Version of what the plan's digest covers and of how scores are computed. Scores under another format are outdated."""
    plan: str | None
    """Digest of the plan; null without a base."""
    tokenizer: str | None
    """Digest of the base's tokenizer, if the suite uses its chat template: it is then part of the plan. Else null."""
    scorer: str
    """Scorer of log-likelihoods."""
    dtype: str | None
    """Dtype of the scoring; null without a base."""
    batch_size: int
    """Requests per forward pass."""
    partial: bool
    """Whether a limit cut the items."""
    versions: dict[str, str]
    """Library -> version."""
    tasks: dict[str, SuiteTask]
    """Task -> its items and metrics."""
    groups: list[dict[str, Any]]
    """Groups of tasks with their aggregates."""


class CheckRow(Document):
    """One check of one task."""

    task: str
    """Name of the task, contrast or suite."""
    check: str
    """Name of the check."""
    status: Literal["ok", "warning", "failed"]
    """Result of the check."""
    found: str
    """Result in words."""
    hint: str | None
    """Advice on how to fix a problem."""


class ExamplePrompt(OpenDocument):
    """An example prompt."""

    id: str
    """Id of the item."""
    prompt: str
    """The prompt."""
    choices: list[str] | None
    """Choices of a multiple-choice item."""
    continuation: Any = optional()
    """Text that is scored after the prompt."""
    target: Any = optional()
    """The right answer."""


class SuiteCheckDocument(Document):
    """Checks of a suite. With a failed check, the exit code is 3."""

    suite: str
    """Name of the suite."""
    base: str
    """Base whose tokenizer was used."""
    ok: bool
    """Whether no check failed."""
    checks: list[CheckRow]
    """All checks."""
    examples: dict[str, list[ExamplePrompt]]
    """Task -> up to three prompts."""


class SuiteNewDocument(Document):
    """A suite that was created from a file of items. With a failed check, the exit code is 3."""

    suite: str
    """Name of the suite and of its task."""
    kind: Literal["choice", "exact", "text"]
    """Kind of its items."""
    files: list[str]
    """The files that were written."""
    items: int
    """Number of items."""
    clusters: int
    """Number of clusters."""
    cluster: str
    """Field that says which items belong together; "id" if every item stands alone."""
    chance: Number | None
    """Score of guessing; null for texts."""
    check: SuiteCheckDocument
    """Checks of the suite, as `suite check` makes them."""
