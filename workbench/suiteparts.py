"""Parts of a suite: differences between two of its tasks, and what its tasks say of edited facts."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import ConfigDict

from workbench.yamldoc import Written

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
