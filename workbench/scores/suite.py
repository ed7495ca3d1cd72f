"""Parts of a suite: differences between two of its tasks, and what its tasks say of edited facts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from workbench.errors import WorkbenchError, nearest
from workbench.facts.kinds import WRITTEN, FactKind
from workbench.yamldoc import Written, load

# How log-likelihoods are computed, with the version of what decides their last bits.
SCORERS = {"hflm": "hflm-1", "packed": "packed-1", "prefix": "prefix-1", "vllm": "vllm-1", "server": "server-1"}
MARGIN = "margin"  # nats by which the gold choice leads the others; every multiple-choice item has it, beside the task's metrics
MIN_EFFECT = 0.02
SCORED_BY = ("lm_eval", "transformers", "torch", "tokenizers", "numpy")  # what computes scores, for records
SUITE_NAME = r"^[A-Za-z0-9][\w.-]*$"
NonNegative = Annotated[float, Field(ge=0)]


class Contrast(Written):
    """What one task's items score above those of another task with the same ids.

    Attributes:
        of, minus: Tasks of the suite.
        metric: The primary metric of `of` if not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: str
    minus: str
    metric: str | None = None


class FactTasks(Written):
    """Which tasks of a suite say what of edited facts.

    Attributes:
        tasks: Kind -> task.
        source: The facts file, for people.
        digest: Of the file's facts: a configuration that was edited for them has it in `edits`. Not given: of any edit.
        cohorts: Number of facts taught -> first, last and sample -> ids of the facts that are looked at then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[FactKind, str]
    source: str = ""
    digest: str | None = None
    cohorts: dict[int, dict[str, tuple[str, ...]]] = {}


def metric_of(name: str) -> str:
    """Return a metric's name without its filter."""
    return name.partition(",")[0]


class Suite(Written):
    """A named list of lm-eval tasks and how their scores are compared.

    Attributes:
        tasks: Names of tasks, or of groups of tasks, which stand for their tasks: local ones under evals/tasks, or any that lm-eval
            bundles. What other fields say of a group holds for its tasks.
        primary: Headline metric of a task; its first metric if not given.
        chance: Score of guessing, by task. If not given: for accuracies of multiple-choice tasks that of guessing among the items'
            choices, else 0.
        cluster: Field of the documents that says which items belong together; one name, or one by task. `id` makes each
            item stand alone.
        limit: Number of items, one for all tasks or by task: those with the smallest hash of their id, never the first ones.
        baseline: Configuration that differences are taken against.
        alpha: Error rate of the verdicts over the family.
        correction: `max-t`, or `none`: every comparison is tested at alpha. `holm` of earlier versions is read as `max-t`.
        min_effect: Smallest difference of interest, and the margin within which configurations are equivalent; one number for
            all metrics that lie in [0, 1], or by task, in the metric's units.
        tolerance: Largest loss on a guarded task that is safe; one number or by task, as min_effect, which it is if not given.
        contrasts: Name -> difference of one metric between two tasks, item by item; a further row of the comparison.
        roles: `skill` (default), `retention` (guarded, and the source of forgetting), `guarded` (must not get worse) or `other` (shown,
            but not part of the mean and of kept), by task.
        owners: Brick that teaches a task.
        facts: Tasks that score edited facts, by what they say of them; the report's view of facts.
        chat_template: Wrap prompts in the tokenizer's chat template.
        num_fewshot: Examples before each prompt; the task's own number if not given.
        scorer: `prefix` forwards what a task's prompts begin with once, and a prompt's choices in one row; `packed` the second
            alone; `hflm` is lm-eval's own loop. Where a check against hflm fails, hflm scores.
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
    correction: Annotated[Literal["max-t", "none"], BeforeValidator(lambda value: "max-t" if value == "holm" else value)] = (
        "max-t"
    )
    min_effect: NonNegative | dict[str, NonNegative] = MIN_EFFECT
    tolerance: NonNegative | dict[str, NonNegative] | None = None
    contrasts: dict[str, Contrast] = {}
    roles: dict[str, Literal["skill", "retention", "guarded", "other"]] = {}
    owners: dict[str, str] = {}
    facts: FactTasks | None = None
    chat_template: bool = False
    num_fewshot: int | None = Field(default=None, ge=0)
    scorer: Literal["prefix", "packed", "hflm"] = "prefix"
    backend: Literal["hf", "vllm", "server"] = "hf"

    @model_validator(mode="after")
    def _names_are_tasks(self) -> Suite:
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
                raise ValueError(f"contrasts: '{name}' is the name of a task: choose another")
            for task in (contrast.of, contrast.minus):
                if task not in self.tasks:
                    raise ValueError(f"contrasts: {name}: '{task}' is not a task of this suite. {nearest(task, self.tasks)}")
            if contrast.of == contrast.minus:
                raise ValueError(f"contrasts: {name}: of and minus are the same task '{contrast.of}'")
        for name in ("min_effect", "tolerance"):
            value, known = getattr(self, name), (*self.tasks, *self.contrasts)
            for task in value if isinstance(value, dict) else ():
                if task not in known:
                    raise ValueError(f"{name}: '{task}' is not a task of this suite. {nearest(task, known)}")
        for task, chance in self.chance.items():
            if not 0 <= chance < 1:
                raise ValueError(f"chance: {task}: expected a number from 0 up to, not including, 1, found {chance}")
        for limit in [self.limit] if isinstance(self.limit, int) else (self.limit or {}).values():
            if limit < 1:
                raise ValueError(f"limit: expected at least 1 item, found {limit}")
        return self

    def cluster_of(self, task: str) -> str:
        """Field that clusters a task's items."""
        return self.cluster if isinstance(self.cluster, str) else self.cluster.get(task, "cluster")

    def limit_of(self, task: str) -> int | None:
        """Number of items of a task; None for all."""
        return self.limit.get(task) if isinstance(self.limit, dict) else self.limit

    def role_of(self, task: str) -> str:
        """skill | retention | guarded | other; the mean over skills and `kept` look at skills only. Contrasts are other."""
        return "other" if task in self.contrasts else self.roles.get(task, "skill")

    def chance_of(self, task: str, kind: str, metric: str) -> float | None:
        """Score of guessing as far as it is known without the items; None where it depends on their choices, or is not known."""
        open_choices = kind == "multiple_choice" and metric_of(metric) != WRITTEN
        return self.chance.get(task, None if open_choices else 0.0)

    def min_effect_of(self, task: str, *, share: bool) -> float | None:
        """Smallest difference of interest on a task or contrast; the suite's one number is for metrics in [0, 1] (`share`) alone."""
        by_task = self.min_effect if isinstance(self.min_effect, dict) else {}
        return by_task.get(task, self.default_effect if share else None)

    def guards(self, task: str) -> bool:
        """Whether a task must not get worse."""
        return self.role_of(task) in ("retention", "guarded")

    def tolerance_of(self, task: str, *, share: bool) -> float | None:
        """Largest loss on a guarded task that is safe; the smallest difference of interest where nothing else is given."""
        if isinstance(self.tolerance, dict) and task in self.tolerance:
            return self.tolerance[task]
        if share and isinstance(self.tolerance, (int, float)):
            return self.tolerance
        return self.min_effect_of(task, share=share)

    @property
    def default_effect(self) -> float:
        """Smallest difference of interest where no task's own is given."""
        return MIN_EFFECT if isinstance(self.min_effect, dict) else self.min_effect


def load_suite(name: str | Path, project: Path) -> Suite:
    """Read a suite by path or, from <project>/evals/suites, by name. Errors: unknown name (with the nearest), invalid fields."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        folder = project / "evals" / "suites"
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.yaml"))
            raise WorkbenchError(f"unknown suite '{name}' in {folder}", nearest(str(name), known))
    elif (project / path).is_file():
        path = project / path
    return load(path).validate(Suite)
