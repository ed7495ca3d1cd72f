"""Fields of a recipe that other commands than `run` read: `eval`, `search` and `sweep`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from workbench.facts.facts import FactKind
from workbench.steps.fields import Real, Strict, Whole


class InlineEval(Strict):
    """A list of lm-eval tasks in the recipe, instead of the name of a suite."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of lm-eval tasks: those of `evals/tasks`, or those that come with lm-eval."""
    num_fewshot: Whole | None = Field(None, ge=0)
    """Number of examples in each prompt; default: the task's."""
    limit: Whole | None = Field(None, ge=1)
    """Score a fixed subset of at most this many items per task."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to every prompt."""
    backend: Literal["hf", "vllm", "server"] = "hf"
    """Backend that scores. `hf`: the live model. `vllm`, `server`: vLLM or a completions server, on the written checkpoint."""


class SequentialEval(Strict):
    """Scores of an edit after a growing number of facts."""

    checkpoints: tuple[Annotated[int, Field(strict=True, ge=1)], ...] = (1, 10, 100, 1000)
    """Numbers of facts, from the start of the file, after which to score the edit. The complete edit is scored last."""
    cohort: Whole | None = Field(None, ge=1)
    """Number of facts in the first and the last cohort; default: the batch size of the edit, at least 10."""
    sample: Whole = Field(50, ge=1)
    """Size of the uniform sample of all facts edited so far."""


class FactsEval(Strict):
    """Scores the facts of a file as lm-eval tasks."""

    facts: str = Field(min_length=1)
    """A facts file, relative to the project, or the directory of an edit brick."""
    tasks: tuple[FactKind, ...] | None = Field(None, min_length=1)
    """Kinds of tasks to score; default: all that the file has prompts for, except `preferred-paraphrase` and `preferred-neighbours`."""
    limit: Whole | None = Field(None, ge=1)
    """Score at most this many facts: those with the smallest hash of their id."""
    generate: bool = True
    """Also score generated text: free answers and n-gram entropy."""
    max_tokens: Whole | None = Field(None, ge=1, le=512)
    """Maximum number of tokens of a generated answer; default: the longest target plus 8, at least 16."""
    neighbour_tokens: Whole = Field(8, ge=1, le=512)
    """Maximum number of tokens of the base's answer to a neighbor prompt, which the edited model must repeat."""
    strict_tokens: Whole = Field(4, ge=1, le=64)
    """Number of the base's first greedy tokens after a neighbor prompt that `neighbours-strict` compares."""
    controls: tuple[Literal["memory", "finetune", "adapter"], ...] = ("memory",)
    """Other ways to teach the same facts, scored as controls: `memory` puts the facts before the prompt; `finetune` and `adapter` train on them, which takes minutes."""
    text: str | None = None
    """A text file with one passage per line, whose perplexity is scored; default: one that comes with the workbench."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to every prompt."""
    sequential: SequentialEval | None = None
    """Also score the edit after its first 1, 10, 100 and 1000 facts; `{}` for these defaults."""

    @model_validator(mode="after")
    def _one_choice(self) -> FactsEval:
        if self.sequential is not None and self.limit is not None:
            raise ValueError("`limit` and `sequential` both select facts: set only one of them")
        return self


def _eval_form(value: Any) -> str:
    if isinstance(value, FactsEval) or (isinstance(value, Mapping) and "facts" in value):
        return "factseval"
    return "inlineeval" if isinstance(value, (Mapping, InlineEval)) else "name"


EvalEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[InlineEval, Tag("inlineeval")] | Annotated[FactsEval, Tag("factseval")],
    Discriminator(_eval_form),
]
"""The name of a suite, the word `edits`, a list of tasks, or a file of facts."""


Value = bool | int | float | str
SEPARATOR = "/"
"""Separates the parts of an objective's name: SUITE, SUITE/TASK or SUITE/TASK/METRIC."""


class Range(Strict):
    """Numbers from `low` to `high`, both included."""

    low: Real
    """Smallest value."""
    high: Real
    """Largest value."""
    log: bool = False
    """Sample on a logarithmic scale. Needs `low` above 0 and no `step`."""
    step: Real | None = Field(None, gt=0)
    """Sample only low, low + step, low + 2 step and so on."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low:g} and {self.high:g}: an empty range")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("`log` needs low > 0 and no `step`")
        return self


class Choices(Strict):
    """A list of values to choose from."""

    choices: tuple[Value, ...] = Field(min_length=2)
    """At least two different values."""

    @field_validator("choices")
    @classmethod
    def _check_distinct(cls, value: tuple[Value, ...]) -> tuple[Value, ...]:
        if len({(type(v), v) for v in value}) < len(value):
            raise ValueError(f"expected choices that differ, found {list(value)}")
        return value


def _expand(value: Any) -> Any:
    """Convert a list of two numbers to a range, and any other list to choices."""
    if not isinstance(value, (list, tuple)):
        return value
    numbers = len(value) == 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    return {"low": float(value[0]), "high": float(value[1])} if numbers else {"choices": value}


def _dimension_form(value: Any) -> str:
    value = _expand(value)
    return "choices" if isinstance(value, Choices) or (isinstance(value, Mapping) and "choices" in value) else "range"


class _ListForm(Strict):
    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return _expand(value)


class ListedRange(_ListForm, Range):
    """A range of numbers. `[low, high]` is a short form."""


class ListedChoices(_ListForm, Choices):
    """A list of values to choose from. A plain list is a short form, except for two numbers, which are a range."""


Dimension = Annotated[
    Annotated[ListedRange, Tag("range")]
    | Annotated[ListedChoices, Tag("choices")]
    | Annotated[tuple[Value, ...], Field(min_length=2), Tag("list")],  # for the schema: a list becomes one of the two above
    Discriminator(_dimension_form),
]
"""`[low, high]`, `{low:, high:, log:, step:}`, a list of choices, or `{choices: [...]}`, which is needed if the choices are two
numbers."""


class Fidelity(Strict):
    """Settings for stopping the scoring of a poor candidate early."""

    items: tuple[Whole, ...] = (25, 75, 225)
    """Numbers of items per task after which a candidate is compared with the best so far, item by item; the first time, also by the log-probabilities of correct answers."""

    @field_validator("items")
    @classmethod
    def _check_ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or value[0] < 2 or any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"expected increasing numbers of at least 2, found {list(value)}")
        return value


class SearchFields(Strict):
    """A search over fields of the recipe, which `workbench search` runs."""

    space: dict[str, Dimension] = Field(min_length=1)
    """Fields to vary: STEP.FIELD -> range or choices, with the id or index of a step. Examples: "mix.lambda", "mix.bricks.math",
    "mix.merge", "mix.lambda.knots.0"."""
    objective: str | tuple[str, ...] | None = None
    """One score or a list of scores to maximize: SUITE (the mean over its skills), SUITE/TASK or SUITE/TASK/METRIC; default: the first suite of `eval`."""
    trials: Whole | None = Field(None, ge=1)
    """Number of candidates, without controls; default: as many as fit into `budget`, or 40."""
    budget: str | None = None
    """Time limit such as "90s", "30m" or "2h", after which no candidate starts. Earlier calls count."""
    sampler: Literal["auto", "gp", "tpe", "cmaes", "nsga2", "random", "grid", "greedy"] = "auto"
    """Sampler that proposes candidates; docs/search.md lists them. `greedy` is the greedy soup: every dimension is a brick's weight with the choices 0 and another number."""
    fidelity: Fidelity = Fidelity()
    """Settings for stopping the scoring of poor candidates early."""
    controls: bool = True
    """First score controls: the base, each brick, their average, task arithmetic, and an LM-Cocktail mean."""
    random: Whole = Field(0, ge=0)
    """Number of additional random candidates, as a comparison for the sampler."""
    test: Real = Field(0.5, gt=0, lt=1)
    """Share of the items that only the winner is scored on. Clusters are not split."""

    @field_validator("budget")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives; empty if the objective is the first suite."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective or ()

    @property
    def number(self) -> int | None:
        """Number of candidates to try; None for as many as the budget allows."""
        return self.trials if self.trials or self.budget else 40


def seconds(text: str) -> float:
    """Convert a time such as "90s", "30m" or "2h" to seconds.

    Raises:
        ValueError: If the text is not a positive time.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"expected a time such as 90s, 30m or 2h, found {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


SweepValue = Value | tuple[str, ...]


def same(a: SweepValue, b: SweepValue) -> bool:
    """Return True if two values are the same in a recipe: 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _distinct(values: tuple[SweepValue, ...]) -> tuple[SweepValue, ...]:
    for i, value in enumerate(values):
        if any(same(value, other) for other in values[:i]):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"expected values that differ, found {shown} twice")
    if len(values) < 2:
        raise ValueError(f"expected at least two values, found {len(values)}; write a single value into the step itself")
    return values


SweepValues = Annotated[tuple[SweepValue, ...], Field(min_length=1), AfterValidator(_distinct)]
"""Values of one dimension: numbers, words or, for a step's `bricks`, lists of names."""
