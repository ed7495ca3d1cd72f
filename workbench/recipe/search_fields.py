"""What a recipe's `search` may hold: dimensions, objectives, how long, and how candidates are scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from workbench.steps.fields import Real, Strict, Whole

Value = bool | int | float | str
SEPARATOR = "/"
"""Between the parts of an objective's name: SUITE, SUITE/TASK, SUITE/TASK/METRIC."""


class Range(Strict):
    """Numbers from `low` to `high`, both included."""

    low: Real
    high: Real
    log: bool = False
    """Draw on a logarithmic scale."""
    step: Real | None = Field(None, gt=0)
    """Only low, low + step, low + 2 step and so on."""

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low:g} and {self.high:g}: an empty range")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("`log` needs low > 0 and no `step`")
        return self


class Choices(Strict):
    """One of some values."""

    choices: tuple[Value, ...] = Field(min_length=2)

    @field_validator("choices")
    @classmethod
    def _differ(cls, value: tuple[Value, ...]) -> tuple[Value, ...]:
        if len({(type(v), v) for v in value}) < len(value):
            raise ValueError(f"expected choices that differ, found {list(value)}")
        return value


def _expand(value: Any) -> Any:
    """[low, high] of two numbers is a range, any other list is one of choices."""
    if not isinstance(value, (list, tuple)):
        return value
    numbers = len(value) == 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    return {"low": float(value[0]), "high": float(value[1])} if numbers else {"choices": value}


def _kind(value: Any) -> str:
    value = _expand(value)
    return "choices" if isinstance(value, Choices) or (isinstance(value, Mapping) and "choices" in value) else "range"


class _Listed(Strict):
    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return _expand(value)


class ListedRange(_Listed, Range):
    """A range, or `[low, high]`."""


class ListedChoices(_Listed, Choices):
    """Choices, or a list of them."""


Dimension = Annotated[
    Annotated[ListedRange, Tag("range")]
    | Annotated[ListedChoices, Tag("choices")]
    | Annotated[tuple[Value, ...], Field(min_length=2), Tag("list")],  # for the schema: a list becomes one of the two above
    Discriminator(_kind),
]
"""`[low, high]` of two numbers, `{low:, high:, log:, step:}`, a list of choices, or `{choices: [...]}`, which two numbers need."""


class Fidelity(Strict):
    """How much of the search items a candidate sees before it is given up."""

    items: tuple[Whole, ...] = (25, 75, 225)
    """Items of each task after which a candidate is compared with the best so far, item by item; after the last number, or all that there are, it is scored in full."""
    gold: bool = True
    """On the first items also compare the log-probability of the right answers, which tells candidates apart with fewer items."""
    level: Real = Field(0.05, gt=0, lt=1)
    """A candidate is given up where an interval of this error rate lies below the best so far."""

    @field_validator("items")
    @classmethod
    def _rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or value[0] < 2 or any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"expected numbers that rise, from 2 on, found {list(value)}")
        return value


class SearchFields(Strict):
    """A search over fields of the recipe. `workbench search RECIPE` runs it; `run` and `eval` take the recipe as it stands."""

    space: dict[str, Dimension] = Field(min_length=1)
    """STEP.FIELD, a step by its id or index, -> what it may be: "mix.lambda", "mix.bricks.math", "mix.merge", "mix.lambda.knots.0"."""
    objective: str | tuple[str, ...] | None = None
    """What is to be best: SUITE (the mean over its skills), SUITE/TASK or SUITE/TASK/METRIC, or several; omitted: the first suite of `eval`."""
    trials: Whole | None = Field(None, ge=1)
    """Candidates, controls not counted; omitted: 40, or as many as fit into `budget`."""
    budget: str | None = None
    """Time: "90s", "30m", "2h". No candidate is begun after it; time before an interruption counts."""
    sampler: Literal["auto", "gp", "tpe", "cmaes", "nsga2", "random", "grid"] = "auto"
    """auto: a Gaussian process for up to 6 dimensions, TPE up to 20, CMA-ES beyond; of several objectives a Gaussian process up to 3
    objectives, else NSGA-II; TPE where a dimension belongs to one method alone."""
    fidelity: Fidelity = Fidelity()
    controls: bool = True
    """Score first what needs no search: the base, each brick, their average, task arithmetic, a mean weighted as LM-Cocktail weighs."""
    random: Whole = Field(0, ge=0)
    """So many candidates more, drawn at random: an arm to compare the sampler with."""
    test: Real = Field(0.5, gt=0, lt=1)
    """Share of the items that no candidate sees: on them the winner is tested. Clusters stay whole, so the share is met about."""

    @field_validator("budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives; none where the first suite is meant."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective or ()

    @property
    def number(self) -> int | None:
        """Candidates to try; None: as many as the budget allows."""
        return self.trials if self.trials or self.budget else 40


def seconds(text: str) -> float:
    """Seconds of "90s", "30m", "2h"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"expected a time such as 90s, 30m or 2h, found {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
