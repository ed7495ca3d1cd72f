"""Suites: their tasks, their analysis settings, contrasts of two tasks and tasks on edited facts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from workbench.facts.facts import WRITTEN, FactKind
from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.recognize import expecting
from workbench.ground.results import JsonObject
from workbench.ground.yamldoc import Written, load

if TYPE_CHECKING:
    from workbench.scores.statistics import Floats

# Versions of the scorers; raise one when the last bits of its log-likelihoods change.
SCORERS = {"hflm": "hflm-1", "packed": "packed-1", "prefix": "prefix-1", "vllm": "vllm-1", "server": "server-1"}
MARGIN = "margin"  # log-likelihood of the gold choice minus the largest of the others, in nats; a further metric of multiple-choice tasks
MIN_EFFECT = 0.02
SCORED_BY = ("lm_eval", "transformers", "torch", "tokenizers", "numpy")  # libraries whose versions are recorded with scores
NOT_BY_TASK = ("contrasts", "facts", "gen_kwargs")  # fields of a suite that are mappings, but not by task
SUITE_NAME = r"^[A-Za-z0-9][\w.-]*$"
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Drawn = Literal["clusters", "items"]


class Contrast(Written):
    """The difference of one metric between two tasks whose items have the same ids.

    Attributes:
        of: Task of the suite.
        minus: Task of the suite whose scores are subtracted.
        metric: Metric of both tasks; default: the primary metric of `of`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: str
    minus: str
    metric: str | None = None


class FactTasks(Written):
    """Tasks of a suite that score edited facts.

    Attributes:
        tasks: Task by kind of test.
        source: Path of the facts file, for display.
        digest: Digest of the file's facts; configurations edited for them have it in `edits`. Default: any edit counts.
        cohorts: For each number of facts taught, the ids of the facts to report, under `first`, `last` and `sample`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[FactKind, str]
    source: str = ""
    digest: str | None = None
    cohorts: dict[int, dict[str, tuple[str, ...]]] = {}


def metric_of(name: str) -> str:
    """Return a metric's name without its filter."""
    return name.partition(",")[0]


SHARE = re.compile(
    r"(?!.*diff)(.*_)?(acc|accuracy|em|exact|match|f1|rouge\w*|bleu|chrf|recall|precision|mrr|pass|mc1|mc2|likelihood|correct)(_.*)?",
    re.IGNORECASE,
)
"""Names of metrics whose scores of items are shares, from 0 to 1, or to 100 as percentages."""
_RANGES = {"brier_score": 2.0}


def reach_of(metric: str, *values: Floats) -> float:
    """Return the largest change of an item's score that the name of a metric declares; 0 if it declares none, or if a score lies outside."""
    name = metric_of(metric)
    highest = max(float(v.max()) for v in values)
    reach = _RANGES.get(name) or ((100.0 if highest > 1 else 1.0) if SHARE.fullmatch(name) else 0.0)
    return reach if highest <= reach and min(float(v.min()) for v in values) >= 0 else 0.0


class Suite(Written):
    """A named list of lm-eval tasks, and the settings for scoring and comparing configurations on them.

    Attributes:
        suite: Name of the suite.
        description: Description for readers.
        tasks: Names of tasks or of groups of tasks: local ones under evals/tasks, or any that lm-eval bundles. Settings of a group in the
            other fields apply to its tasks.
        primary: Primary metric by task; default: the task's first metric.
        chance: Chance score by task. Default: for accuracies of multiple-choice tasks the score of guessing among the items' choices,
            else 0.
        cluster: Field of the documents whose value is the item's cluster (items that belong together); one name, or names by task.
            `id` makes each item its own cluster.
        limit: Number of items, one for all tasks or by task: the items with the smallest hash of their id, not the first ones.
        baseline: Configuration against which differences are computed.
        alpha: Error rate of the verdicts over a family of comparisons.
        looks: How often scores are looked at while items are added; each look is tested at alpha / looks, so that all of them together
            keep alpha.
        correction: `max-t`, or `none` to test every comparison at alpha. `holm` from earlier versions is read as `max-t`.
        min_effect: Smallest difference of interest; differences within it are equivalent. One number for all metrics that lie in [0, 1],
            or numbers by task, in the metric's units.
        tolerance: Largest loss on a guarded task that counts as safe; one number or by task, like min_effect, which is the default.
        worst: Largest change of a cluster's mean that can occur, in the metric's units, one number or by task; set before scores are seen.
            "Safe" and "equivalent" must hold if few clusters change that much and none of them was drawn. Default: the metric's range.
        drawn: What "safe" and "equivalent" are about, one word or by task: `clusters`, all of the kind that was drawn, or `items`, further
            items of these clusters only.
        contrasts: Difference of one metric between two tasks, item by item, by name; each is a further row of the comparison.
        roles: Role by task: `skill` (default), `retention` (guarded, and the basis of forgetting), `guarded` (must not get worse) or `other`
            (shown, but not part of the mean over skills and of kept skill).
        owners: Brick that teaches a task, by task.
        facts: Tasks that score edited facts, for the report's view of facts.
        chat_template: Wrap prompts in the tokenizer's chat template.
        num_fewshot: Number of examples before each prompt; default: the task's own number.
        system_instruction: Text before each prompt, or the system message with `chat_template`; lm-eval's --system_instruction.
        gen_kwargs: Settings of generation, such as `temperature` or `max_gen_toks`, which replace those of each task that generates text;
            lm-eval's --gen_kwargs.
        scorer: `prefix` runs the common beginning of a task's prompts once and the choices of a prompt in one row; `packed` does only the
            latter; `hflm` is lm-eval's own loop. If a check against hflm fails, hflm scores.
        backend: `hf` scores live models; `vllm` and `server` score written checkpoints through lm-eval's classes of those names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str = Field(pattern=SUITE_NAME)
    description: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)
    primary: dict[str, str] = {}
    chance: dict[str, float] = {}
    cluster: str | dict[str, str] = "cluster"
    limit: int | dict[str, int] | None = None
    baseline: str = "base"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    looks: int = Field(default=1, ge=1)
    correction: Annotated[Literal["max-t", "none"], BeforeValidator(lambda value: "max-t" if value == "holm" else value)] = (
        "max-t"
    )
    min_effect: NonNegative | dict[str, NonNegative] = MIN_EFFECT
    tolerance: NonNegative | dict[str, NonNegative] | None = None
    worst: Positive | dict[str, Positive] | None = None
    drawn: Drawn | dict[str, Drawn] = "clusters"
    contrasts: dict[str, Contrast] = {}
    roles: dict[str, Literal["skill", "retention", "guarded", "other"]] = {}
    owners: dict[str, str] = {}
    facts: FactTasks | None = None
    chat_template: bool = False
    num_fewshot: int | None = Field(default=None, ge=0)
    system_instruction: str | None = Field(default=None, min_length=1)
    gen_kwargs: dict[str, bool | int | float | str | list[str | int] | None] = {}
    scorer: Literal["prefix", "packed", "hflm"] = "prefix"
    backend: Literal["hf", "vllm", "server"] = "hf"

    @model_validator(mode="after")
    def _names_are_tasks(self) -> Suite:
        """Check that names in other fields are tasks of the suite, and that numbers are in their ranges."""
        twice = [name for name, count in Counter(self.tasks).items() if count > 1]
        if twice:
            raise ValueError(f"tasks: '{twice[0]}' is listed twice")
        for name in ("primary", "chance", "cluster", "limit", "roles", "owners"):
            value = getattr(self, name)
            for task in value if isinstance(value, dict) else ():
                if task not in self.tasks:
                    raise ValueError(f"{name}: '{task}' is not a task of this suite. {nearest(task, self.tasks)}")
        for task in self.facts.tasks.values() if self.facts else ():
            if task not in self.tasks:
                raise ValueError(f"facts: '{task}' is not a task of this suite. {nearest(task, self.tasks)}")
        for name, contrast in self.contrasts.items():
            if name in self.tasks:
                raise ValueError(f"contrasts: '{name}' is the name of a task; choose another name")
            for task in (contrast.of, contrast.minus):
                if task not in self.tasks:
                    raise ValueError(f"contrasts: {name}: '{task}' is not a task of this suite. {nearest(task, self.tasks)}")
            if contrast.of == contrast.minus:
                raise ValueError(f"contrasts: {name}: `of` and `minus` are the same task '{contrast.of}'")
        for name in ("min_effect", "tolerance", "worst", "drawn"):
            value, known = getattr(self, name), (*self.tasks, *self.contrasts)
            for task in value if isinstance(value, dict) else ():
                if task not in known:
                    raise ValueError(f"{name}: '{task}' is not a task of this suite. {nearest(task, known)}")
        for task, chance in self.chance.items():
            if not 0 <= chance < 1:
                raise ValueError(f"chance: {task}: expected a number of at least 0 and less than 1, found {chance}")
        for limit in [self.limit] if isinstance(self.limit, int) else (self.limit or {}).values():
            if limit < 1:
                raise ValueError(f"limit: expected at least 1 item, found {limit}")
        return self

    def only(self, tasks: Collection[str]) -> Suite:
        """Return the suite with some of its tasks; settings, contrasts and facts of the others are left out."""
        chosen = tuple(task for task in self.tasks if task in tasks)
        if chosen == self.tasks:
            return self
        contrasts = {name: c for name, c in self.contrasts.items() if {c.of, c.minus} <= {*chosen}}
        fields: dict[str, object] = {"tasks": chosen, "contrasts": contrasts}
        if self.facts and not {*self.facts.tasks.values()} <= {*chosen}:
            fields["facts"] = None
        for field, value in self:
            if value and isinstance(value, dict) and field not in NOT_BY_TASK:
                fields[field] = {name: v for name, v in value.items() if name in chosen or name in contrasts}
        return self.model_copy(update=fields)

    def cluster_of(self, task: str) -> str:
        """Return the field that holds the cluster of a task's items."""
        return self.cluster if isinstance(self.cluster, str) else self.cluster.get(task, "cluster")

    def limit_of(self, task: str) -> int | None:
        """Return the number of items of a task, or None for all."""
        return self.limit.get(task) if isinstance(self.limit, dict) else self.limit

    def role_of(self, task: str) -> str:
        """Return the role of a task: skill, retention, guarded or other; contrasts are other."""
        return "other" if task in self.contrasts else self.roles.get(task, "skill")

    def chance_of(self, task: str, kind: str, metric: str) -> float | None:
        """Return the chance score if it is known without the items, or None if it depends on their choices."""
        open_choices = kind == "multiple_choice" and metric_of(metric) != WRITTEN
        return self.chance.get(task, None if open_choices else 0.0)

    def min_effect_of(self, task: str, *, share: bool) -> float | None:
        """Return the smallest difference of interest; a suite-wide number applies only to metrics in [0, 1] (`share`)."""
        by_task = self.min_effect if isinstance(self.min_effect, dict) else {}
        return by_task.get(task, self.default_effect if share else None)

    def guards(self, task: str) -> bool:
        """Return True if a task must not get worse."""
        return self.role_of(task) in ("retention", "guarded")

    def tolerance_of(self, task: str, *, share: bool) -> float | None:
        """Return the largest loss on a guarded task that counts as safe; default: the smallest difference of interest."""
        if isinstance(self.tolerance, dict) and task in self.tolerance:
            return self.tolerance[task]
        if share and isinstance(self.tolerance, (int, float)):
            return self.tolerance
        return self.min_effect_of(task, share=share)

    def worst_of(self, task: str, *, share: bool) -> float | None:
        """Return the largest change of a cluster's mean; None for the metric's range, if it has one."""
        if isinstance(self.worst, dict):
            return self.worst.get(task)
        return self.worst if share else None

    def draws_items(self, task: str) -> bool:
        """Return True if "safe" and "equivalent" are about further items of these clusters only."""
        return (self.drawn.get(task) if isinstance(self.drawn, dict) else self.drawn) == "items"

    @property
    def default_effect(self) -> float:
        """Smallest difference of interest for tasks without their own."""
        return MIN_EFFECT if isinstance(self.min_effect, dict) else self.min_effect


class Aggregate(JsonObject):
    """One entry of a group's `aggregate_metric_list`."""

    metric: str
    """Name without its filter: `acc`."""
    filters: tuple[str, ...] | None = None
    """Filters whose metrics are aggregated, one aggregate per filter; null: all filters that a task has."""
    weighted: bool = True
    """Whether each task is weighted by its number of items (`weight_by_size`)."""


class TaskGroup(JsonObject):
    """A group with all tasks of its subgroups, in the order of the file."""

    name: str
    """Name of the group."""
    alias: str
    """Name of the group in tables."""
    tasks: tuple[str, ...]
    """Names of its tasks."""
    aggregates: tuple[Aggregate, ...] = ()
    """What is aggregated over its tasks."""


def load_suite(name: str | Path, project: Path) -> Suite:
    """Read a suite by path, or by name from <project>/evals/suites.

    Raises:
        WorkbenchError: If the name is unknown or a field is invalid.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        folder = project / "evals" / "suites"
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.yaml"))
            raise WorkbenchError(f"unknown suite '{name}' in {folder}", nearest(str(name), known))
    elif (project / path).is_file():
        path = project / path
    with expecting(path, "a suite", "suite"):
        return load(path).validate(Suite)
