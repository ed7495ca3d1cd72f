"""What a recipe's `eval` may hold beside the names of suites: tasks, and facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from workbench.facts.kinds import FactKind
from workbench.steps.fields import Strict, Whole


class InlineEval(Strict):
    """lm-eval tasks named in the recipe itself instead of a suite."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """lm-eval task names: of `evals/tasks`, or lm-eval's own, for which it fetches data from the hub."""
    num_fewshot: Whole | None = Field(None, ge=0)
    """Examples in the prompt; omitted: the task's own number."""
    limit: Whole | None = Field(None, ge=1)
    """A fixed subset of so many items a task."""
    chat_template: bool = False
    """Put every prompt into the tokenizer's chat template."""
    backend: Literal["hf", "vllm", "server"] = "hf"
    """What scores: the live model, or vLLM or a completions server on the written checkpoint."""


class SequentialEval(Strict):
    """Checkpoints of an edit that takes facts one after another."""

    checkpoints: tuple[Annotated[int, Field(strict=True, ge=1)], ...] = (1, 10, 100, 1000)
    """Numbers of facts, from the start of the file, after which the edit is scored; those below the edit's own, which is the last."""
    cohort: Whole | None = Field(None, ge=1)
    """Facts of the first and of the last cohort; omitted: a batch of the edit, at least ten."""
    sample: Whole = Field(50, ge=1)
    """Facts of the uniform sample of all facts so far."""


class FactsEval(Strict):
    """The facts of a file as lm-eval tasks."""

    facts: str = Field(min_length=1)
    """A facts file, relative to the project, or the directory of an edit brick."""
    tasks: tuple[FactKind, ...] | None = Field(None, min_length=1)
    """What is scored; omitted: all that the file has prompts for, but for `preferred-paraphrase` and `preferred-neighbours`."""
    limit: Whole | None = Field(None, ge=1)
    """At most so many facts: those with the smallest hash of their id."""
    generate: bool = True
    """Also score text that the model writes: generated answers and the n-gram entropy."""
    max_tokens: Whole | None = Field(None, ge=1, le=512)
    """Tokens of a generated answer; omitted: eight more than the longest target has, at least 16."""
    neighbour_tokens: Whole = Field(8, ge=1, le=512)
    """Most tokens of the base's answer to a neighbour's prompt, all of which have to stay."""
    text: str | None = None
    """A text file, one passage a line, whose perplexity is scored; omitted: one that comes with the workbench."""
    chat_template: bool = False
    """Put every prompt into the tokenizer's chat template."""
    sequential: SequentialEval | None = None
    """Score the edit after its first 1, 10, 100, 1000 facts too: `{}`, or with the fields below."""

    @model_validator(mode="after")
    def _one_choice(self) -> FactsEval:
        if self.sequential is not None and self.limit is not None:
            raise ValueError("`limit` and `sequential` both choose facts: give one")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, FactsEval) or (isinstance(value, Mapping) and "facts" in value):
        return "factseval"
    return "inlineeval" if isinstance(value, (Mapping, InlineEval)) else "name"


EvalEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[InlineEval, Tag("inlineeval")] | Annotated[FactsEval, Tag("factseval")],
    Discriminator(_kind),
]
"""A suite's name, `edits`, or one of the two above."""
