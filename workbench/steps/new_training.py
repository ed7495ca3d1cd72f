"""Training of the parameters that a growth step adds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workbench.steps.fields import Real, Strict, Whole

TRAINING_VERSION = 2
"""Version of what training computes: prompt and completion are tokenized as one text; rows are padded on the right."""


class NewTraining(Strict):
    """Further training of what a grow step has added; every old element of every tensor stays the same bits."""

    version: ClassVar[int] = TRAINING_VERSION
    """Part of the step's key."""

    data: str = Field(min_length=1)
    """A jsonl of {"prompt":, "completion":} or {"text":}, relative to the project. Of a prompt's rows the completion is learned."""
    replay: str | None = None
    """Prompts, {"prompt"} a line of a jsonl, that the model learns to continue as it does before training, or with the `completion` that
    stands there: keeps what it can do."""
    replay_share: Real = Field(0.3, gt=0, lt=1)
    """Part of the rows that are replayed, when `replay` is given."""
    replay_tokens: Whole = Field(6, ge=1)
    """Tokens sampled after each replayed prompt."""
    parameters: Literal["new_only", "routers"] = "new_only"
    """new_only: all that the step has added. routers: of these the routers of experts alone."""
    steps: Whole = Field(100, ge=1)
    """Optimizer steps (AdamW, without weight decay)."""
    batch_size: Whole = Field(8, ge=1)
    """Rows a step."""
    learning_rate: Real = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup: Whole = Field(10, ge=0)
    """Steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after that."""
    max_length: Whole = Field(256, ge=8)
    """Most tokens a row may have; a longer row is an error."""
    held_out: Real | str | None = None
    """A share of the rows, or a jsonl file, that is not trained on and whose loss is measured."""
    evaluate_every: Whole = Field(10, ge=1)
    """Steps between two such measurements."""
    patience: Whole | None = Field(None, ge=1)
    """Stop after so many measurements without a lower loss, and keep the weights that had the lowest."""
    balance: Real = Field(0.0, ge=0)
    """Of experts: weight of −I(expert; token), which is low where every token has decided and all experts are used alike (ModuleFormer)."""
    concentration: Real = Field(0.0, ge=0)
    """Of experts: weight of the entropy of the mean routing distribution, which is low where few experts are used (ModuleFormer)."""

    @model_validator(mode="after")
    def _held(self) -> Self:
        if self.patience is not None and self.held_out is None:
            raise ValueError("patience: expected held_out beside it, whose loss decides when to stop")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, or the name of a jsonl file; found {self.held_out:g}")
        return self

    def inputs(self) -> list[str]:
        """Files that it reads."""
        return [f for f in (self.data, self.replay, self.held_out) if isinstance(f, str)]

    def settings(self) -> dict[str, Any]:
        """The fields of a `workbench.train.TrainSpec`, without seed."""
        return {
            **self.model_dump(mode="json", exclude={"parameters", "balance", "concentration"}),
            "method": "full",
            "save_every": 0,
        }
