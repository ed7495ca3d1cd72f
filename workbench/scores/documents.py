"""Documents of the score store: the scored configuration, its metrics with their intervals, and the readers of these documents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from workbench.ground.errors import LeftOut, WorkbenchError
from workbench.ground.files import write_bytes
from workbench.ground.jsondoc import read_object
from workbench.ground.results import JsonObject
from workbench.models.identity import identity
from workbench.scores.files import Row, Rows, is_number, wrong_value
from workbench.scores.plan import PlanRecord, ScorePlan
from workbench.scores.statistics import RATIOS, interval, score

FORMAT = 2  # format of the scores document; since 2 it holds digests of its rows and items
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = NotNegative
DESIGN_ORDER = ("base", "brick", "average", "memory", "finetune", "adapter", "configuration")


@dataclass(frozen=True)
class Configuration:
    """A configuration that is scored.

    Attributes:
        digest: Identity, 32 hex digits: equal digests mean equal scores. It is the digest of the weights, of the generation settings
            that decide generated texts, and of the tokenizer (`models.generation.identity`).
        name: Name that users see.
        role: base | brick | average | memory | finetune | adapter | configuration.
        parents: Names of the bricks that it is made from.
        recipe: Path of its recipe, relative to the project.
        base: Digest of its base.
        parameters: Number of parameters; None if only scores are known.
        bytes: Size of the weights as a checkpoint; None if only scores are known.
        bricks: Bytes on disk by name of the bricks that its steps use.
        edits: Digests of the facts files for which its steps or bricks edit it.
        first: Number of facts that its edit uses, from the start of the file; None for all.
        weights: Digest of the weights, if it differs from `digest`.
        axes: Brick -> axis -> value, for the bricks with files (origin, granularity, computation, ...).
        form: Form in which `run` writes it: checkpoint, adapter or configuration; None for controls and if only scores are known.
        written: Bytes that `run` writes; None where `form` is None.
        members: Routed brick -> the bricks that it is made from, for routed bricks that are recipes.
        licences: "base" or a brick's name -> its license, "unknown" if none is stated; empty if only scores are known.
        tokenizer: Digest of its tokenizer; None if only scores are known.
        settings: Methods of its steps with their settings; None if only scores are known, and in documents of earlier versions.
        made: Words after `workbench run` that make it; empty if it is there already or only scores are known. Not stored.
        target: Name of its run, or of the model that is there; empty if only scores are known. Not stored.
    """

    digest: str
    name: str
    role: str = "configuration"
    parents: tuple[str, ...] = ()
    recipe: str | None = None
    base: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    bricks: Mapping[str, int] = field(default_factory=dict, hash=False)
    edits: tuple[str, ...] = ()
    first: int | None = None
    weights: str | None = None
    axes: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)
    form: str | None = None
    written: int | None = None
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    licences: Mapping[str, str] = field(default_factory=dict, hash=False)
    tokenizer: str | None = None
    settings: str | None = field(default=None, compare=False)
    made: Annotated[tuple[str, ...], Field(exclude=True)] = field(default=(), compare=False)
    target: Annotated[str, Field(exclude=True)] = field(default="", compare=False)

    def key(self, plan: ScorePlan) -> str:
        """Return the digest under which the store keeps scores of a plan, with the tokenizer that the plan's texts are read with.

        Generation settings count only if a task generates text.
        """
        return identity(self.digest if plan.generates else self.of_weights, {}, plan.tokenizer_digest)

    @property
    def of_weights(self) -> str:
        """Digest of the weights, without generation settings and tokenizer."""
        return self.weights or self.digest

    def __post_init__(self) -> None:
        if self.role not in DESIGN_ORDER:
            raise ValueError(f"role {self.role!r} of {self.name}: expected one of {', '.join(DESIGN_ORDER)}")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Alias(_Document):
    """Another name of the same weights."""

    name: str
    role: str
    recipe: str | None = None
    digest: str | None = None
    """Identity of the configuration, if its generation settings differ from the document's."""


class Metric(_Document):
    """A mean over items, a ratio of sums over items or a metric of the whole corpus, with its 95 % interval."""

    value: Finite
    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Metric:
        slack = 1e-9 * max(1.0, abs(self.value))
        if not self.low - slack <= self.value <= self.high + slack:
            raise ValueError(f"the value {self.value:g} is outside its interval from {self.low:g} to {self.high:g}")
        return self

    @field_validator("low", "high", mode="before")
    @classmethod
    def _infinite_end(cls, value: Any, info: ValidationInfo) -> Any:
        """Read null as an infinite end: the interval of a single cluster has no finite ends, and JSON has no infinity."""
        return (-math.inf if info.field_name == "low" else math.inf) if value is None else value

    @classmethod
    def of(cls, values: Sequence[Any], cluster: NDArray[np.intp], kind: str | None = None) -> Metric:
        """Compute a metric from the values of items in stored rows; `kind` is that of `statistics.score`."""
        numbers = np.asarray(values, np.float64).reshape(len(values), -1)
        weights = numbers[:, 1] if kind in RATIOS else None
        low, high = interval(kind, numbers[:, 0], cluster, weights)
        return cls(value=score(kind, numbers[:, 0], weights), low=low, high=high)


class Measured(_Document):
    """Measurements of scoring a task on the machine that did it. Nothing of it enters a key or a digest.

    Attributes:
        tokens_per_second: Tokens of answers per second of generating; None if no text was generated.
        peak_bytes: Peak of memory while the task was scored; None if the model was in another process.
        peak_of: What the peak counts, in words.
        resumed: True if answers of an interrupted evaluation were used, whose time is not in the task's seconds.
    """

    tokens_per_second: NotNegative | None = None
    peak_bytes: int | None = Field(default=None, ge=0)
    peak_of: str | None = None
    resumed: bool = False


class TaskScores(_Document):
    """Scores on one task; `scorer` computed its log-likelihoods and is "generate" for tasks without any.

    Attributes:
        tokens: Tokens of the prompts and choices that were scored.
        answers: Number of generated texts; None if there are none, or in documents of earlier versions.
        answer_tokens: Number of tokens of these texts together.
        measured: What scoring cost on this machine; None in documents of earlier versions and for imported scores.
    """

    n: int = Field(ge=1, strict=True)
    metrics: dict[str, Metric]
    seconds: Seconds | None = None
    scorer: str | None = None
    tokens: int | None = None
    answers: int | None = Field(default=None, ge=1)
    answer_tokens: int | None = Field(default=None, ge=0)
    measured: Measured | None = None

    @field_validator("metrics")
    @classmethod
    def _possible(cls, metrics: dict[str, Metric]) -> dict[str, Metric]:
        for name, metric in metrics.items():
            if expected := wrong_value(name, metric.value):
                raise ValueError(f"{name} is {metric.value:g}, expected {expected}")
        return metrics


class TaskResult(TypedDict):
    """Result of scoring a task. An evaluation keeps it until the configuration is complete; earlier versions kept no lengths of answers."""

    rows: list[Row]
    items: list[Row]
    seconds: float
    device: str
    scorer: str
    tokens: int | None
    answers: NotRequired[int | None]
    answer_tokens: NotRequired[int | None]
    measured: NotRequired[dict[str, object]]
    check: NotRequired[dict[str, object] | None]


class Check(_Document):
    """A check of a scorer against lm-eval's HFLM on some documents of each task, before the scorer is used.

    Attributes:
        documents: Number of documents that were compared.
        max_difference: Largest difference of log-likelihoods, in nats.
        tolerance: Largest difference that passes the check.
        spread: HFLM's own difference between batch sizes in the dtype of the weights; None in float32, and for a short check.
        whole: Name of the configuration whose whole check counts for this one, which differs from it in the weights alone and was
            compared on one document; None if this is a whole check.
    """

    scorer: str
    documents: int
    max_difference: Finite
    tolerance: Finite
    spread: Finite | None = None
    whole: str | None = None

    @property
    def passed(self) -> bool:
        """True if the largest difference is within the tolerance."""
        return self.max_difference <= self.tolerance


class Skipped(JsonObject):
    """A configuration that the command skipped."""

    name: str
    """Name of the configuration."""
    reason: str
    """Reason for skipping it."""

    @classmethod
    def all(cls, left_out: Sequence[LeftOut]) -> list[Skipped] | None:
        """Return the skipped configurations for a document, which leaves them out where there are none."""
        return [cls(name=one.name, reason=one.reason) for one in left_out] or None


class Scores(_Document):
    """Stored scores of one configuration under one plan.

    Attributes:
        key: Digest under which they are stored: `Configuration.key` of the plan.
        rows: Digest of the file of the configuration's rows.
        items: Digest of the file of the plan's items.
    """

    version: int = FORMAT
    suite: str
    plan: str
    configuration: Configuration
    aliases: tuple[Alias, ...] = ()
    partial: bool = False
    key: str = ""
    rows: str | None = None
    items: str | None = None
    seconds: Seconds
    device: str
    created: str
    versions: dict[str, str]
    tasks: dict[str, TaskScores]
    check: Check | None = None
    tokens: int | None = None

    @property
    def names(self) -> list[str]:
        """All names of the configuration, the displayed one first."""
        return [self.configuration.name, *(alias.name for alias in self.aliases)]

    def also(self, configuration: Configuration) -> Scores:
        """Return these scores with one more name of the same weights."""
        return self.model_copy(update={"aliases": (*self.aliases, _alias(configuration))})

    def called(self, configuration: Configuration) -> Scores:
        """Return these scores under the name of a configuration; its other names become aliases.

        Names of the same weights with other generation settings are dropped, because they are other configurations.
        """
        own_digest, new_digest = self.configuration.digest, configuration.digest
        names = (_alias(self.configuration), *self.aliases)
        others = tuple(a for a in names if a.name != configuration.name and (a.digest or own_digest) == new_digest)
        return self.model_copy(update={"configuration": configuration, "aliases": others})

    def knows(self, configuration: Configuration) -> bool:
        """Return True if the document holds this name of this configuration."""
        own_digest = self.configuration.digest
        return any(
            (a.name, a.digest or own_digest) == (configuration.name, configuration.digest)
            for a in (_alias(self.configuration), *self.aliases)
        )


def _alias(configuration: Configuration) -> Alias:
    return Alias(name=configuration.name, role=configuration.role, recipe=configuration.recipe, digest=configuration.digest)


def write_document(path: Path, scores: Scores) -> None:
    """Write a scores document, with one field a line."""
    write_bytes(path, (scores.model_dump_json(indent=1) + "\n").encode())


def read_document(path: Path) -> Scores:
    """Read a scores document. Documents of format 1 have no key, because the key was the configuration's digest.

    Raises:
        WorkbenchError: If the document is damaged or its format is unknown.
    """
    document = read_object(path, None, rescore_hint(path))
    version = document.get("version")
    if version not in (1, FORMAT):
        raise WorkbenchError(
            f"{path}: the scores document has format {json.dumps(version)[:20]}, this version reads formats up to {FORMAT}",
            f"Install the version that wrote it, or score again: rm {path}",
        )
    try:
        scores = Scores.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise WorkbenchError(f"{path}: {where}: {first['msg']}", rescore_hint(path)) from error
    if path.parent.name != f"{scores.suite}-{scores.plan[:12]}":
        raise WorkbenchError(f"{path}: the document's suite and plan differ from those in its folder's name", rescore_hint(path))
    if version == FORMAT and not (scores.key and scores.rows and scores.items):
        raise WorkbenchError(f"{path}: expected a key and the digests of rows and items", rescore_hint(path))
    return scores if scores.key else scores.model_copy(update={"key": scores.configuration.digest})


def disagreement(scores: Scores, rows: Rows) -> str | None:
    """Describe a difference between rows and their scores document in tasks, counts or means; None if they agree."""
    if rows.keys() != scores.tasks.keys():
        return f"found rows of the tasks {', '.join(rows) or 'none'}, expected {', '.join(scores.tasks)}"
    for task, about in scores.tasks.items():
        if len(rows[task]) != about.n:
            return f"found {len(rows[task])} rows of '{task}', expected {about.n}"
        for metric, stored in about.metrics.items():
            values = [
                v[0] if isinstance(v, list) and len(v) == 1 else v for v in (row["metrics"].get(metric) for row in rows[task])
            ]
            if not all(map(is_number, values)):
                continue  # ratios of sums: the comparison checks them
            mean = float(np.mean(np.asarray(values, np.float64)))
            if not math.isclose(mean, stored.value, rel_tol=1e-9, abs_tol=1e-9):
                return f"the mean {metric} of the rows of '{task}' is {mean:g}, the scores document has {stored.value:g}"
    return None


def plan_record(folder: Path) -> PlanRecord:
    """Read the plan.json of a plan's folder.

    Raises:
        WorkbenchError: If it is missing or damaged.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise WorkbenchError(f"{path}: the file does not exist, but scores refer to it", rescore_hint(path))
    return PlanRecord.read(path, rescore_hint(path))


def rescore_hint(path: Path) -> str:
    """Return the hint to delete a damaged file of the store together with the files that depend on it."""
    shared = path.name.startswith(("plan.", "items."))
    what = path.parent if shared else path.parent / f"{path.name.split('.')[0]}.*"
    return f"Delete the damaged scores and score again (for imported scores: import again): rm -r {what}"
