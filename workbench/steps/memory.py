"""What a memory method takes and gives: facts kept beside a model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.facts.credibility import Credibility
from workbench.steps.edit import MethodContext
from workbench.steps.fields import Real
from workbench.steps.step import KeyContext, Step

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.facts import Fact


class MemoryMethod(Step):
    """Facts into a memory that acts on the live model. It ends a recipe: no step can be applied to what it gives."""

    kind = "memory"
    verb = "edit"
    verb_order = 1
    ends_recipe = True
    version = 2  # prompt and answer, or facts and prompt, are tokenized as one text
    unkeyed = frozenset({"min_efficacy"})

    min_efficacy: Real = Field(0.5, ge=0, le=1)
    """Share of the step's facts that the model has to say after it (greedily, all of the target): with fewer, `run` writes no model and
    exits with 3; 0: any number."""
    facts: str
    """A jsonl or YAML of facts, relative to the project."""
    alpha: Real = Field(0.5, ge=0)
    """Credibility of a fact without feedback; LinUCB's weight of what is not known."""
    decay: Real = Field(0.98, gt=0, le=1)
    """Share of feedback that is left a version later."""
    floor: Real = Field(0.25, ge=0)
    """A fact whose credibility has sunk below this is not used."""

    @property
    def efficacy_gate(self) -> float:
        """Share of the step's facts that the model has to say."""
        return self.min_efficacy

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the files' content, the seed, and the vocabulary that facts are tokenized with."""
        return [context.files(self.inputs()), [context.seed, context.vocabulary(context.number)]]

    def inputs(self) -> list[str]:
        """Return the facts file."""
        return [self.facts]

    def check_inputs(self, project: Path) -> None:
        """Read the facts once. Raises WorkbenchError if they are not facts."""
        from workbench.facts import read_facts

        read_facts(project / self.facts, self.facts)

    def solve(self, context: MethodContext) -> Memory:
        """A memory of the step's facts."""
        from workbench.facts import read_facts

        return self.learn(context, read_facts(context.project / self.facts, self.facts))

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """What the memory keeps of some facts. Each fact's tensors depend on no other fact, so that any can be taken out again."""
        raise NotImplementedError

    def reopened(self, settings: Mapping[str, Any]) -> MemoryMethod:
        """The step as it learns further facts for a saved memory with these settings."""
        return self

    def check_together(self, remembered: Sequence[Remembered]) -> None:
        """Errors: facts that cannot stand in one memory."""

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, Any]:
        """Make a memory act on a live model; returns what was chosen over all facts, as plain data (radii, thresholds)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory:
    """What a method keeps of facts."""

    facts: Sequence[Fact]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Fact id -> its tensors by name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the method chose for the model, as plain data: the module, the layer."""
    record: dict[str, Any] = field(default_factory=dict)
    """What it measured."""


@dataclass(frozen=True)
class Remembered:
    """A fact of a memory at a version."""

    fact: Fact
    tensors: Mapping[str, Tensor]
    credibility: Credibility
    """What feedback says of it."""


@dataclass(frozen=True)
class Kept:
    """A memory at a version: its settings, and its facts in the order of their ids."""

    settings: Mapping[str, Any]
    facts: Sequence[Remembered]
