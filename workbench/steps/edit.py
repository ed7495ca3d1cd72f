"""What an edit method takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.files import json_digest
from workbench.models.layout import Model
from workbench.steps.fields import Real
from workbench.steps.step import KeyContext, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.facts import Fact
    from workbench.weights.lowrank import Factors


class EditMethod(Step):
    """Facts into a low-rank delta of the current model."""

    kind = "edit"
    verb = "edit"
    verb_order = 1
    version = 2  # prompt and target are tokenized as one text
    unkeyed = frozenset({"min_efficacy"})

    min_efficacy: Real = Field(0.5, ge=0, le=1)
    """Share of the step's facts that the model has to say after it (greedily, all of the target): with fewer, `run` writes no model and
    exits with 3; 0: any number."""

    @property
    def efficacy_gate(self) -> float:
        """Share of the step's facts that the model has to say."""
        return self.min_efficacy

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the files' content, the seed, and the vocabulary that facts are tokenized with."""
        return [context.files(self.inputs()), [context.seed, context.vocabulary(context.number)]]

    def cost(self, model: Model, project: Path, cache: Path) -> dict[str, Any]:
        """What `plan` says of the work: plain data for the step's row; `tokens` that are run through the model forward, or
        forward and back, count towards its seconds."""
        return {}

    def solve(self, context: MethodContext) -> Edit:
        """Solve on the live current model. Must leave no trace but its result."""
        raise NotImplementedError


@dataclass(frozen=True)
class Edit:
    """An edit's result: tensor name -> low-rank update, and what the method measured."""

    factors: dict[str, Factors]
    record: dict[str, Any] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    """Whether the base stores the updated weights as [in, out] (Conv1D)."""
    facts: Sequence[Fact] = ()
    """What it was solved for; kept beside the factors."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What a later solve on other weights can start from: keys and values, by name."""


@dataclass(frozen=True)
class MethodContext:
    """What an edit may use."""

    model: PreTrainedModel
    """Live, float32, on `device`, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    layout: Model
    """Names, shapes and configuration of the same model."""
    device: torch.device
    project: Path
    seed: int
    progress: Callable[[int, int, str], None]
    """(done, total, text)"""
    cache: Path
    """The project's cache: values, statistics and sweeps are kept there."""
    digests: Mapping[str, str]
    """Tensor name -> digest of its float32 values: what anything kept in the cache is keyed by."""

    @cached_property
    def weights_key(self) -> str:
        """Digest of all weights."""
        return json_digest(sorted(self.digests.items()))
