"""Interface of memory methods, which store facts beside a model and leave its weights unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.facts.log import Credibility
from workbench.steps.edit import MethodContext
from workbench.steps.fields import Real
from workbench.steps.step import KeyContext, Step

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.facts import Fact


class MemoryMethod(Step):
    """Turns facts into a memory that acts on the live model. It must be the last step of a recipe."""

    kind = "memory"
    verb = "edit"
    verb_order = 1
    ends_recipe = True
    version = 2  # prompt and answer, or facts and prompt, are tokenized as one text
    unkeyed = frozenset({"min_efficacy"})

    min_efficacy: Real = Field(0.5, ge=0, le=1)
    """Smallest share of the step's facts for which the model with the memory must generate the complete target (greedy decoding).
    Below it, `run` writes no model and exits with code 3. 0 accepts any result."""
    facts: str
    """A JSON Lines or YAML file of facts, relative to the project."""
    alpha: Real = Field(0.5, ge=0)
    """Credibility of a fact that has no feedback yet (the exploration weight of LinUCB)."""
    decay: Real = Field(0.98, gt=0, le=1)
    """Factor by which the weight of feedback falls with each later version of the memory."""
    floor: Real = Field(0.25, ge=0)
    """The memory does not use a fact whose credibility is below this value."""

    @property
    def efficacy_gate(self) -> float:
        """Smallest share of the step's facts that the model must say."""
        return self.min_efficacy

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of the input files, the seed, and the digest of the tokenizer."""
        return [context.files(self.inputs()), [context.seed, context.tokens(context.number)]]

    def inputs(self) -> list[str]:
        """Return the facts file."""
        return [self.facts]

    def check_inputs(self, project: Path) -> None:
        """Read the facts file once. Raises WorkbenchError if it is not a valid file of facts."""
        from workbench.facts import read_facts

        read_facts(project / self.facts, self.facts)

    def solve(self, context: MethodContext) -> Memory:
        """Return a memory of the step's facts."""
        from workbench.facts import read_facts

        return self.learn(context, read_facts(context.project / self.facts, self.facts))

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """Return a memory of the given facts. Each fact's tensors must not depend on other facts, so that it can be removed."""
        raise NotImplementedError

    def reopened(self, settings: Mapping[str, Any]) -> MemoryMethod:
        """Return the step configured to add facts to a saved memory with these settings."""
        return self

    def check_together(self, remembered: Sequence[Remembered]) -> None:
        """Raise WorkbenchError if one memory cannot hold all of these facts."""

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> dict[str, Any]:
        """Attach a memory to a live model. Return the settings chosen over all facts (radii, thresholds) as plain data."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory:
    """Result of a memory method: facts and the tensors that store them."""

    facts: Sequence[Fact]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Fact id -> its tensors by name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Choices of the method for this model, such as the module and the layer, as plain data."""
    record: dict[str, Any] = field(default_factory=dict)
    """Measurements of the method, as plain data."""


@dataclass(frozen=True)
class Remembered:
    """A fact of a memory at a given version."""

    fact: Fact
    tensors: Mapping[str, Tensor]
    credibility: Credibility
    """Its credibility, from feedback."""


@dataclass(frozen=True)
class Kept:
    """A memory at a given version: its settings, and its facts in the order of their ids."""

    settings: Mapping[str, Any]
    facts: Sequence[Remembered]
