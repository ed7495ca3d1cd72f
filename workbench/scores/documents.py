"""Documents of the score store: what was scored, its metrics with their intervals, and how these documents are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from workbench.errors import WorkbenchError
from workbench.jsondoc import read_object
from workbench.scores.files import Rows, is_number, wrong_value
from workbench.scores.plan import ScorePlan
from workbench.scores.statistics import RATIOS, ratio, ratio_interval, score_interval

FORMAT = 2  # of the scores document: from 2 on it holds digests of its rows and items
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DESIGN_ORDER = ("base", "brick", "average", "configuration")


@dataclass(frozen=True)
class Configuration:
    """What is scored.

    Attributes:
        digest: Identity, 32 hex digits: equal digest, equal scores. The digest of the weights, together with the generation settings
            where these decide texts (`models.generation.identity`).
        weights: Digest of the weights alone, where it is another one.
        role: base | brick | average | configuration.
        parents: Names of the bricks it was made from.
        recipe: Project-relative path of its recipe.
        base: Digest of its base.
        parameters, bytes: Of the weights as they would be written as a checkpoint; None where only scores are known.
        bricks: Name -> bytes on disk of the bricks that its steps use.
        edits: Digests of the facts that it was edited for, by its steps or by those bricks.
        first: How many facts of a file its edit has taken, from the start; None: all.
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

    def key(self, plan: ScorePlan) -> str:
        """Return the digest that scores under a plan are stored by: generation settings count only where a task generates text."""
        return self.digest if plan.generates else self.of_weights

    @property
    def of_weights(self) -> str:
        """Digest of the weights alone."""
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
    """Identity of the configuration, where it differs from the document's in its generation settings."""


class Metric(_Document):
    """A mean over items, or a ratio of sums over them, with its 95 % interval."""

    value: Finite
    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Metric:
        slack = 1e-9 * max(1.0, abs(self.value))
        if not self.low - slack <= self.value <= self.high + slack:
            raise ValueError(f"the value {self.value:g} lies outside its interval from {self.low:g} to {self.high:g}")
        return self

    @field_validator("low", "high", mode="before")
    @classmethod
    def _endless(cls, value: Any, info: ValidationInfo) -> Any:
        """An interval of a single cluster has no ends; JSON has no infinity and keeps null."""
        return (-math.inf if info.field_name == "low" else math.inf) if value is None else value

    @classmethod
    def of(cls, values: Sequence[Any], cluster: NDArray[np.intp], kind: str | None = None) -> Metric:
        """Return the metric of items' scores; with a `kind` of ratio (`statistics.RATIOS`) that of their pairs (numerator, weight)."""
        numbers = np.asarray(values, np.float64)
        if kind:
            low, high = ratio_interval(kind, numbers[:, 0], numbers[:, 1], cluster)
            return cls(value=ratio(kind, numbers[:, 0], numbers[:, 1]), low=low, high=high)
        low, high = score_interval(numbers, cluster)
        return cls(value=float(numbers.mean()), low=low, high=high)


class TaskScores(_Document):
    """Scores on one task; `scorer` is what computed its log-likelihoods, "generate" where there are none."""

    n: int = Field(ge=1, strict=True)
    metrics: dict[str, Metric]
    seconds: Seconds | None = None
    scorer: str | None = None
    tokens: int | None = None

    @field_validator("metrics")
    @classmethod
    def _possible(cls, metrics: dict[str, Metric]) -> dict[str, Metric]:
        for name, metric in metrics.items():
            if expected := wrong_value(name, metric.value):
                raise ValueError(f"{name} is {metric.value:g}, expected {expected}")
        return metrics


class Check(_Document):
    """A scorer compared with lm-eval's HFLM on some documents of each task, before its numbers count.

    Attributes:
        documents: How many were compared.
        max_difference: Of log-likelihoods, in nats.
        tolerance: What it may be.
        spread: HFLM's own difference between batch sizes, where the dtype is not float32.
    """

    scorer: str
    documents: int
    max_difference: Finite
    tolerance: Finite
    spread: Finite | None = None


class Scores(_Document):
    """Scores of one configuration under one plan, as stored.

    Attributes:
        key: What they are stored by: `Configuration.key` of the plan.
        rows, items: Digests of the files beside the document: the configuration's rows, and what the items ask.
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
        """All names of the configuration, the shown one first."""
        return [self.configuration.name, *(alias.name for alias in self.aliases)]

    def also(self, configuration: Configuration) -> Scores:
        """Return the same scores with one more name of the same weights."""
        return self.model_copy(update={"aliases": (*self.aliases, _alias(configuration))})

    def called(self, configuration: Configuration) -> Scores:
        """Return the same scores shown under the name that is asked for; the other names of that configuration become aliases.

        Names of the same weights with other generation settings are left out: they are other configurations.
        """
        mine, asked = self.configuration.digest, configuration.digest
        named = (_alias(self.configuration), *self.aliases)
        others = tuple(a for a in named if a.name != configuration.name and (a.digest or mine) == asked)
        return self.model_copy(update={"configuration": configuration, "aliases": others})

    def knows(self, configuration: Configuration) -> bool:
        """Return whether the document holds this name of this configuration."""
        mine = self.configuration.digest
        return any(
            (a.name, a.digest or mine) == (configuration.name, configuration.digest)
            for a in (_alias(self.configuration), *self.aliases)
        )


def _alias(configuration: Configuration) -> Alias:
    return Alias(name=configuration.name, role=configuration.role, recipe=configuration.recipe, digest=configuration.digest)


def read_document(path: Path) -> Scores:
    """Return a scores document. Documents of format 1 lack the key, which was the configuration's digest.

    Raises:
        WorkbenchError: The document is damaged, or its format is unknown.
    """
    found = read_object(path, None, again(path))
    version = found.get("version")
    if version not in (1, FORMAT):
        raise WorkbenchError(
            f"{path}: a scores document of format {json.dumps(version)[:20]}, this version reads up to {FORMAT}",
            f"Install the version that wrote it, or score again: rm {path}",
        )
    try:
        scores = Scores.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise WorkbenchError(f"{path}: {where}: {first['msg']}", again(path)) from error
    if path.parent.name != f"{scores.suite}-{scores.plan[:12]}":
        raise WorkbenchError(f"{path}: names a suite and a plan that are not those of its folder", again(path))
    if version == FORMAT and not (scores.key and scores.rows and scores.items):
        raise WorkbenchError(f"{path}: expected a key and the digests of rows and items", again(path))
    return scores if scores.key else scores.model_copy(update={"key": scores.configuration.digest})


def disagreement(scores: Scores, rows: Rows) -> str | None:
    """Return in what rows differ from their scores document (tasks, counts, means); None if they agree."""
    if rows.keys() != scores.tasks.keys():
        return f"rows of the tasks {', '.join(rows) or 'none'}, expected {', '.join(scores.tasks)}"
    for task, about in scores.tasks.items():
        if len(rows[task]) != about.n:
            return f"{len(rows[task])} rows of '{task}', expected {about.n}"
        for metric, found in about.metrics.items():
            values = [row["metrics"].get(metric) for row in rows[task]]
            if not all(map(is_number, values)):
                continue  # ratios of sums: the comparison checks them
            mean = float(np.mean(np.asarray(values, np.float64)))
            if not math.isclose(mean, found.value, rel_tol=1e-9, abs_tol=1e-9):
                return f"the mean {metric} of '{task}' is {mean:g}, and the scores document says {found.value:g}"
    return None


def plan_record(folder: Path) -> dict[str, Any]:
    """Return the plan.json of a plan's folder. Raises WorkbenchError if it is missing or damaged."""
    path = folder / "plan.json"
    if not path.is_file():
        raise WorkbenchError(f"{path}: no such plan, although scores name it", again(path))
    record, hint = read_object(path, None, again(path)), again(path)
    tasks, suite = record.get("tasks"), record.get("suite")
    if not isinstance(suite, dict) or not isinstance(suite.get("suite"), str) or not isinstance(record.get("plan"), str):
        raise WorkbenchError(f"{path}: expected a suite and the digest of a plan", hint)
    for task, about in tasks.items() if isinstance(tasks, dict) else [("", None)]:
        kinds = {"n": int, "kind": str, "metrics": list, "primary": str}
        if not isinstance(about, dict) or any(not isinstance(about.get(key), kind) for key, kind in kinds.items()):
            raise WorkbenchError(f"{path}: tasks: {task or 'missing'}: expected an object with {', '.join(kinds)}", hint)
        ratios, lower = about.get("ratios", {}), about.get("lower", [])
        known = isinstance(ratios, dict) and all(kind in RATIOS for kind in ratios.values())
        if not known or not isinstance(lower, list) or not all(isinstance(metric, str) for metric in about["metrics"]):
            raise WorkbenchError(f"{path}: tasks: {task}: expected names of metrics, and kinds of ratios under 'ratios'", hint)
    # Imported plans do not know dtype and batch size: null.
    shown: dict[str, tuple[type, ...]] = {
        "scorer": (str,),
        "dtype": (str, type(None)),
        "batch_size": (int, type(None)),
        "partial": (bool,),
        "versions": (dict,),
    }
    for name, expected in shown.items():
        if not isinstance(record.get(name, ...), expected):
            raise WorkbenchError(f"{path}: {name}: found {str(record.get(name))[:80]}, which no plan has there", hint)
    _check_groups(record, path)
    return record


def _check_groups(record: Mapping[str, Any], path: Path) -> None:
    """Errors: groups whose tasks the plan has not, or entries of another form."""
    groups = record.get("groups", [])
    for group in groups if isinstance(groups, list) else [None]:
        fits = isinstance(group, dict) and all(isinstance(group.get(key), str) for key in ("name", "alias"))
        tasks, entries = (group.get("tasks"), group.get("aggregates")) if fits and group else (None, None)
        fits = (
            isinstance(tasks, list)
            and all(isinstance(t, str) and t in record["tasks"] for t in tasks)
            and isinstance(entries, list)
        )
        for entry in entries if fits and entries else []:
            filters = entry.get("filters") if isinstance(entry, dict) else 0
            listed = filters is None or (isinstance(filters, list) and all(isinstance(f, str) for f in filters))
            fits = fits and listed and isinstance(entry.get("metric"), str) and isinstance(entry.get("weighted"), bool)
        if not fits:
            raise WorkbenchError(
                f"{path}: groups: expected names, tasks of the plan and aggregates, found {str(group)[:80]}", again(path)
            )
    for task, about in record["tasks"].items():
        filters = about.get("filters", ["none"])
        if not isinstance(filters, list) or not all(isinstance(f, str) for f in filters):
            raise WorkbenchError(f"{path}: tasks: {task}: filters: expected names, found {str(filters)[:80]}", again(path))


def again(path: Path) -> str:
    """Return the hint that removes a damaged file of the store, with all that makes no sense without it."""
    shared = path.name.startswith(("plan.", "items."))
    what = path.parent if shared else path.parent / f"{path.name.split('.')[0]}.*"
    return f"Remove the damaged scores and score again (imported scores: import again): rm -r {what}"
