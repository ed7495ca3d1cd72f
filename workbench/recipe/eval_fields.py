"""Entries of a recipe's `eval` other than names of suites: lm-eval tasks and facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from workbench.facts.facts import FactKind
from workbench.steps.fields import Strict, Whole


class InlineEval(Strict):
    """A list of lm-eval tasks in the recipe, instead of the name of a suite."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of lm-eval tasks: tasks defined in `evals/tasks`, or tasks that come with lm-eval, which downloads their data from
    the hub."""
    num_fewshot: Whole | None = Field(None, ge=0)
    """Number of examples in each prompt. If omitted, the number that the task defines."""
    limit: Whole | None = Field(None, ge=1)
    """Score a fixed subset of at most this many items per task."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to every prompt."""
    backend: Literal["hf", "vllm", "server"] = "hf"
    """Backend that scores. `hf`: the live model. `vllm` or `server`: vLLM or a completions server, which load the written
    checkpoint."""


class SequentialEval(Strict):
    """Scores of an edit after a growing number of facts."""

    checkpoints: tuple[Annotated[int, Field(strict=True, ge=1)], ...] = (1, 10, 100, 1000)
    """Numbers of facts, counted from the start of the file, after which to score the edit. Numbers that are not below the edit's
    number of facts are ignored; the complete edit is always scored last."""
    cohort: Whole | None = Field(None, ge=1)
    """Number of facts in the first cohort and in the last cohort. If omitted, the batch size of the edit, but at least 10."""
    sample: Whole = Field(50, ge=1)
    """Size of the uniform sample of all facts edited so far."""


class FactsEval(Strict):
    """Scores the facts of a file as lm-eval tasks."""

    facts: str = Field(min_length=1)
    """A facts file, relative to the project, or the directory of an edit brick."""
    tasks: tuple[FactKind, ...] | None = Field(None, min_length=1)
    """Kinds of tasks to score. If omitted, all kinds that the file has prompts for, except `preferred-paraphrase` and
    `preferred-neighbours`."""
    limit: Whole | None = Field(None, ge=1)
    """Score at most this many facts: those with the smallest hash of their id."""
    generate: bool = True
    """Also score generated text: free answers and n-gram entropy."""
    max_tokens: Whole | None = Field(None, ge=1, le=512)
    """Maximum number of tokens of a generated answer. If omitted, the length of the longest target plus 8, but at least 16."""
    neighbour_tokens: Whole = Field(8, ge=1, le=512)
    """Maximum number of tokens of the base's answer to a neighbor prompt. The edited model must give the same tokens."""
    strict_tokens: Whole = Field(4, ge=1, le=64)
    """Number of the base's first greedy tokens after a neighbor prompt that `neighbours-strict` compares."""
    controls: tuple[Literal["memory", "finetune", "adapter"], ...] = ("memory",)
    """Other ways to teach the same facts, scored as controls if a configuration is edited for them. `memory` puts the facts before the
    prompt (`edit: memory`); `finetune` trains one layer on them (`edit: finetune`), and `adapter` a LoRA on facts and paraphrases (`edit:
    adapter`), which both take minutes. `[]` scores none."""
    text: str | None = None
    """A text file with one passage per line, whose perplexity is scored. If omitted, a file that comes with the workbench."""
    chat_template: bool = False
    """Apply the tokenizer's chat template to every prompt."""
    sequential: SequentialEval | None = None
    """Also score the edit after its first 1, 10, 100 and 1000 facts. Write `{}` for these defaults, or set the fields of
    `sequential`."""

    @model_validator(mode="after")
    def _one_choice(self) -> FactsEval:
        if self.sequential is not None and self.limit is not None:
            raise ValueError("`limit` and `sequential` both select facts: set only one of them")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, FactsEval) or (isinstance(value, Mapping) and "facts" in value):
        return "factseval"
    return "inlineeval" if isinstance(value, (Mapping, InlineEval)) else "name"


EvalEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[InlineEval, Tag("inlineeval")] | Annotated[FactsEval, Tag("factseval")],
    Discriminator(_kind),
]
"""The name of a suite, the word `edits`, a list of tasks, or a file of facts."""
