"""Interface of edit methods: base class, context and result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workbench.files import json_digest
from workbench.models.identity import computed_on, loaded_tokens_digest
from workbench.models.layout import Model
from workbench.steps.fields import Real
from workbench.steps.step import KeyContext, Step
from workbench.weights.digests import meaning_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.facts import Fact, Start
    from workbench.weights.lowrank import Factors


class EditMethod(Step):
    """Turns facts into a low-rank delta of the current model."""

    kind = "edit"
    verb = "edit"
    verb_order = 1
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

    def cost(self, model: Model, project: Path, cache: Path) -> dict[str, Any]:
        """Return the cost of solving the step as plain data, which `plan` shows in the step's row.

        Args:
            model: Names, shapes and configuration of the model before the step.
            project: Folder that the step's files are relative to.
            cache: The project's cache.

        Returns:
            Plain data. `plan` estimates seconds from its key `tokens`, the number of tokens that run through the model.
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
    record: dict[str, Any] = field(default_factory=dict)
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
