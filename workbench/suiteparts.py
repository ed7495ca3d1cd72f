"""Parts of a suite: differences between two of its tasks, and what its tasks say of edited facts."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import ConfigDict

from workbench.yamldoc import Written

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # lm-eval's: whether the choice that scores best is a gold one
WRITTEN = "exact_match"  # of a choice: whether the model would write it unasked, among all texts, so that guessing scores 0

FactKind = Literal[
    "efficacy",
    "preferred",
    "paraphrase",
    "preferred-paraphrase",
    "neighbours",
    "neighbours-right",
    "preferred-neighbours",
    "portability",
    "generated",
    "generated-paraphrase",
    "entropy",
    "text",
]
FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)


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
