"""Interfaces of methods that teach facts: edits, which change weights, and memories, which store facts beside a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import Field

from workbench.facts.log import Credibility
from workbench.ground.files import json_digest
from workbench.models.identity import computed_on, loaded_tokens_digest
from workbench.models.layout import Model
from workbench.steps.fields import Real
from workbench.steps.step import KeyContext, Step
from workbench.weights.digests import meaning_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.facts.facts import Fact
    from workbench.facts.stream import Start
    from workbench.weights.lowrank import Factors


class Cost(TypedDict, total=False):
    """Work of solving an edit, which `plan` shows. It estimates seconds from `tokens`, those that run through the model.

    `memory` is what the edit holds beside the model, in bytes, which `plan` adds to the memory of the run.
    """

    layers: Literal["auto"] | tuple[int, ...]
    sweep: dict[str, int]
    continues: dict[str, str | int]
    work: dict[str, int]
    facts: int
    steps: int
    tokens: int
    memory: int


class EditMethod(Step):
    """Turns facts into a low-rank delta of the current model."""

    kind = "edit"
    verb = "edit"
    version = 2  # prompt and target are tokenized as one text
    unkeyed = frozenset({"min_efficacy"})

    min_efficacy: Real = Field(0.5, ge=0, le=1)
    """Smallest share of the step's facts for which the edited model must generate the complete target (greedy decoding). Below
    it, `run` writes no model and exits with code 3. 0 accepts any result."""

    @property
    def efficacy_gate(self) -> float:
        """Smallest share of the step's facts that the edited model must say."""
        return self.min_efficacy

    @property
    def in_order(self) -> bool:
        """True if the step reads its facts file as a stream, in which later rows update or remove earlier facts."""
        return getattr(self, "mode", "joint") != "joint"

    def stream_start(self, project: Path) -> Start | None:
        """Return the earlier stream that the step's facts file continues; None if it starts a stream.

        Args:
            project: Folder that the step's files are relative to.

        Raises:
            WorkbenchError: If the earlier stream cannot be continued.
        """
        return None

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of the input files, the seed, and the digest of the tokenizer."""
        return [context.files(self.inputs()), [context.seed, context.tokens(context.number)]]

    def check_model(self, model: Model) -> None:
        """Check from names and shapes that the step can edit the model.

        Args:
            model: Names, shapes and configuration before the step.

        Raises:
            WorkbenchError: If it cannot.
        """

    def cost(self, model: Model, project: Path, cache: Path) -> Cost:
        """Return the cost of solving the step, which `plan` shows in the step's row.

        Args:
            model: Names, shapes and configuration of the model before the step.
            project: Folder that the step's files are relative to.
            cache: The project's cache.
        """
        return {}

    def solve(self, context: MethodContext) -> Edit:
        """Solve the edit on the live current model. The model must be unchanged afterwards."""
        raise NotImplementedError


@dataclass(frozen=True)
class Edit:
    """Result of an edit."""

    factors: dict[str, Factors]
    """Tensor name -> low-rank update."""
    record: Mapping[str, object] = field(default_factory=dict)
    """Measurements of the method, as plain data."""
    fan_in_fan_out: bool = False
    """True if the base stores the updated weights as [in, out] (Conv1D)."""
    facts: Sequence[Fact] = ()
    """The facts that the edit teaches; saved with the factors."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Keys and values by name, from which a later solve on other weights can start."""
    stream: Sequence[Fact] = ()
    """The statements of the stream that the edit has written, in order, if a later run can continue it."""
    history: dict[str, Tensor] = field(default_factory=dict)
    """Values of this stream by name, with which a later run continues it without optimizing them again."""


@dataclass(frozen=True)
class MethodContext:
    """Everything that an edit method may use."""

    model: PreTrainedModel
    """The live current model: float32, on `device`, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    layout: Model
    """Names, shapes and configuration of the same model."""
    device: torch.device
    project: Path
    seed: int
    progress: Callable[[int, int, str], None]
    """Callback that takes (done, total, text)."""
    cache: Path
    """The project's cache, which stores values, statistics and sweeps."""
    digests: Mapping[str, str]
    """Tensor name -> digest of its float32 values; cache keys are made from these."""
    earlier: Sequence[Path] = ()
    """Directories of the edits that earlier steps of the recipe have made, in order."""

    @cached_property
    def _around(self) -> list[Any]:
        """What results depend on besides the tensors: config.json, the tokenizer, the device and the libraries."""
        return [meaning_of(self.layout.config), loaded_tokens_digest(self.tokenizer), computed_on(self.device)]

    @cached_property
    def model_key(self) -> str:
        """Key of everything that is computed on the model as it is."""
        return self.key_without(())

    def key_without(self, unread: Collection[str]) -> str:
        """Return the key of what is computed on the model without reading some tensors.

        Args:
            unread: Names of the tensors that the result does not depend on, such as those of higher layers.
        """
        return json_digest([sorted((n, d) for n, d in self.digests.items() if n not in unread), *self._around])


class MemoryMethod(Step):
    """Turns facts into a memory that acts on the live model. It must be the last step of a recipe."""

    kind = "memory"
    verb = "edit"
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
        from workbench.facts.published import read_facts

        read_facts(project / self.facts, self.facts)

    def solve(self, context: MethodContext) -> Memory:
        """Return a memory of the step's facts."""
        from workbench.facts.published import read_facts

        return self.learn(context, read_facts(context.project / self.facts, self.facts))

    def learn(self, context: MethodContext, facts: Sequence[Fact]) -> Memory:
        """Return a memory of the given facts. Each fact's tensors must not depend on other facts, so that it can be removed."""
        raise NotImplementedError

    def reopened(self, settings: Mapping[str, object]) -> MemoryMethod:
        """Return the step configured to add facts to a saved memory with these settings."""
        return self

    def check_together(self, remembered: Sequence[Remembered]) -> None:
        """Raise WorkbenchError if one memory cannot hold all of these facts."""

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Kept) -> Mapping[str, object]:
        """Attach a memory to a live model. Return the settings chosen over all facts (radii, thresholds) as plain data."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory:
    """Result of a memory method: facts and the tensors that store them."""

    facts: Sequence[Fact]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Fact id -> its tensors by name."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Choices of the method for this model, such as the module and the layer, as plain data."""
    record: Mapping[str, object] = field(default_factory=dict)
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

    settings: Mapping[str, object]
    facts: Sequence[Remembered]
