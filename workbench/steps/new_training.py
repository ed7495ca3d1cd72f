"""Settings for training the parameters that a growth step adds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workbench.steps.fields import Real, Strict, Whole

TRAINING_VERSION = 2
"""Version of the training computation, part of keys. Version 2 tokenizes prompt and completion as one text and pads rows on the
right."""


class NewTraining(Strict):
    """Trains the parameters that a grow step adds. Every old element of every tensor stays bit-identical."""

    version: ClassVar[int] = TRAINING_VERSION
    """Part of the step's key."""
    whole: ClassVar[bool] = False
    """True if all parameters of the model are trained."""

    data: str = Field(min_length=1)
    """A JSON Lines file, relative to the project, with rows {"prompt":, "completion":}, {"text":} or {"messages":}. In rows with a
    prompt, only the completion is trained on; of a conversation, each answer."""
    replay: str | None = None
    """A JSON Lines file with rows {"prompt":} that preserve what the model can already do. The model trains on its own
    continuation of each prompt, sampled before training, or on the row's `completion` if there is one."""
    replay_share: Real = Field(0.3, gt=0, lt=1)
    """Share of the rows that come from `replay`."""
    replay_tokens: Whole = Field(6, ge=1)
    """Number of tokens sampled after each replayed prompt."""
    parameters: Literal["new_only", "routers"] = "new_only"
    """Parameters to train. `new_only`: everything that the step adds. `routers`: only the added routers of experts."""
    steps: Whole = Field(100, ge=1)
    """Number of optimizer steps (AdamW without weight decay)."""
    batch_size: Whole = Field(8, ge=1)
    """Rows per optimizer step."""
    learning_rate: Real = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup: Whole = Field(10, ge=0)
    """Number of steps over which the learning rate rises to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    max_length: Whole = Field(256, ge=8)
    """Maximum number of tokens in a row. A longer row is an error."""
    held_out: Real | str | None = None
    """Rows to exclude from training and measure the loss on: a share of the rows, or a JSON Lines file."""
    evaluate_every: Whole = Field(10, ge=1)
    """Number of steps between two measurements of the held-out loss."""
    patience: Whole | None = Field(None, ge=1)
    """Stop after this number of measurements without a lower held-out loss, and keep the weights with the lowest loss. Needs
    `held_out`."""
    balance: Real = Field(0.0, ge=0)
    """Weight of the routing loss −I(expert; token), which is low if each token has a clear expert and all experts are used
    equally (ModuleFormer)."""
    concentration: Real = Field(0.0, ge=0)
    """Weight of the entropy of the mean routing distribution as a loss, which is low if few experts are used (ModuleFormer)."""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.patience is not None and self.held_out is None:
            raise ValueError("patience: needs held_out, whose loss decides when to stop")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, or the name of a jsonl file; found {self.held_out:g}")
        return self

    def inputs(self) -> list[str]:
        """Return the files that the training reads, relative to the project."""
        return [f for f in (self.data, self.replay, self.held_out) if isinstance(f, str)]

    @property
    def is_taught(self) -> bool:
        """True if the model learns the distributions of the model before the step, instead of the texts."""
        return False

    def settings(self) -> dict[str, Any]:
        """Return the fields of a `workbench.train.TrainSpec`, except the seed."""
        return {
            **self.model_dump(mode="json", exclude={"parameters", "balance", "concentration"}),
            "method": "full",
            "save_every": 0,
        }


class Recovery(NewTraining):
    """Trains all parameters of a model that a step made smaller, so that it recovers what it has lost."""

    whole: ClassVar[bool] = True

    parameters: Literal["all"] = "all"  # type: ignore[assignment]  # a smaller model has no new parameters
    """Parameters to train: `all` of the smaller model."""
    teacher: Literal["before", "none"] = "before"
    """`before`: the model learns the next-token distributions of the model before the step on the texts (the loss is
    KL(before ‖ after), Minitron's). `none`: it learns the texts themselves."""
    learning_rate: Real = Field(2e-4, gt=0)
    """Peak learning rate."""

    @property
    def is_taught(self) -> bool:
        """True if the model before the step is the teacher."""
        return self.teacher == "before"

    def settings(self) -> dict[str, Any]:
        """Return the fields of a `workbench.train.TrainSpec`, except the seed."""
        return {name: value for name, value in super().settings().items() if name != "teacher"}
