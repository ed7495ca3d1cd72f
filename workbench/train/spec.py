"""Settings of a training, as in train.yaml."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from workbench.ground.lazy import torch
from workbench.ground.yamldoc import Written

KEYED_IF_SET = frozenset({"epochs", "gradient_accumulation_steps", "packing", "dtype"})
"""Settings that are part of keys and cards only where they differ from their defaults, so that earlier trainings keep their keys."""


class HubData(Written):
    """Training rows from a data set on the hub, or from a local folder or file (jsonl, parquet, csv)."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True)

    hub: str = Field(min_length=1)
    """Id of a data set on the hub, or a folder or file relative to the folder of train.yaml."""
    revision: str | None = None
    """Commit, tag or branch of the data set."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    split: str = "train"
    """Split of the data set, or a part of one in the syntax of `datasets`, such as train[:1000]."""
    prompt: str | None = None
    """Column with the prompts. If omitted, completions are whole texts."""
    completion: str = "completion"
    """Column with the texts to learn."""
    messages: str | None = None
    """Column with conversations, lists of {role:, content:}; `prompt` and `completion` are then not used."""
    tools: str | None = None
    """Column with the tools of each conversation: lists of functions, or their JSON."""

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if self.tools is not None and self.messages is None:
            raise ValueError("tools: requires messages, the column of the conversations")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out columns of conversations unless they are set, so that the keys of earlier trainings stay."""
        data: dict[str, object] = dump(self)
        return {name: value for name, value in data.items() if name not in ("messages", "tools") or value is not None}


class TrainSpec(Written):
    """Settings of the training of one brick, as in train.yaml. Equal settings on equal data give equal bricks."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True)

    data: str | HubData = "train.jsonl"
    """Training rows: a jsonl file relative to the folder of train.yaml, with {"prompt", "completion"}, {"text"} or {"messages"} per
    line, or a data set {hub:, revision:, config:, split:, prompt:, completion:, messages:, tools:}. All tokens of a text but the first
    are learned. Of a conversation every answer is learned, tool calls included, worded by the tokenizer's chat template; each answer is
    a row."""
    method: Literal["lora", "full"] = "lora"
    """Training method: `lora` trains an adapter, `full` trains all weights. Both are saved in bfloat16."""
    replay: str | None = None
    """Prompts that the brick learns to continue as the base does: a jsonl file relative to the folder of train.yaml, with
    {"prompt"} or {"prompt", "completion"} per line. The base samples missing completions before training. Replay limits changes
    outside the brick's skill, which makes the brick easier to merge."""
    replay_share: float = Field(0.3, gt=0, lt=1)
    """Share of replayed rows among all rows, if `replay` is set."""
    replay_tokens: int = Field(6, ge=1)
    """Number of tokens to sample after each replayed prompt."""
    rank: int = Field(8, ge=1)
    """Rank of the adapter (LoRA)."""
    alpha: int = Field(16, ge=1)
    """Numerator of the scale alpha / rank of the adapter's update (LoRA)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: `all-linear`, which is all linear layers except the output head, or a list of name endings
    (LoRA)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of the adapter's input (LoRA)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    steps: int = Field(150, ge=1)
    """Number of optimizer steps."""
    epochs: int | None = Field(None, ge=1)
    """Number of passes over all rows, instead of `steps`. Each pass has its own order, and its last step the rows that are left."""
    batch_size: int = Field(16, ge=1)
    """Number of rows per forward pass, which is a step unless gradients are accumulated."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Number of batches per optimizer step. The loss is the mean over all learned tokens of the step, as in one large batch. Rows of
    similar length share a batch, so that small batches have little padding."""
    packing: bool = False
    """Compute a batch as one row without padding, in which no text sees another. Faster where rows differ in length; an error for
    architectures that would mix the texts."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the computation, and of the frozen base (LoRA). Trained weights are float32 during the training in any case."""
    max_length: int = Field(128, ge=8)
    """Maximum number of tokens per row. A longer row is an error; rows are never truncated."""
    warmup: int = Field(10, ge=0)
    """Number of steps over which the learning rate increases from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    learn_end: bool = True
    """Learn the end of the sequence after each completion. Set it to false for bricks that answer in a fixed number
    of tokens: in a merge, a brick that learned to stop early may truncate the answers of other bricks."""
    held_out: float | str | None = None
    """Rows to measure the loss on and never train on: a share of the prompts between 0 and 1, or a jsonl file relative to the
    folder of train.yaml."""
    evaluate_every: int = Field(10, ge=1)
    """Number of steps between two measurements of the held-out loss, which is also measured before training and at the end."""
    patience: int | None = Field(None, ge=1)
    """Number of measurements without a lower held-out loss after which training stops. The brick then has the weights with the
    lowest held-out loss."""
    save_every: int = Field(50, ge=0)
    """Number of steps between two saves, from which an interrupted training resumes; 0 disables saves."""
    orthogonal_to: tuple[str, ...] = ()
    """Other LoRA bricks whose A matrices the new A matrices should be orthogonal to (O-LoRA): names in bricks/, or directories
    relative to the folder of train.yaml."""
    orthogonal: float = Field(0.02, ge=0)
    """Weight λ of the orthogonality penalty λ Σ ‖A_i Aᵀ‖² over bricks i and modules. The paper uses 0.5, which outweighs the
    training loss if many modules have an adapter."""
    seed: int = Field(0, ge=0)
    """Seed of adapter initialization, row order and dropout."""

    @field_validator("held_out")
    @classmethod
    def _check_share(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"expected a share between 0 and 1, or the name of a jsonl file; found {value:g}")
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.patience is not None and self.held_out is None:
            raise ValueError("patience: requires held_out, whose loss decides when to stop")
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError("epochs: expected either epochs or steps, found both; remove one of them")
        if self.orthogonal_to and self.method == "full":
            raise ValueError("orthogonal_to: expected method lora, found full; a full fine-tune has no A matrices")
        return self

    @property
    def weights_dtype(self) -> torch.dtype:
        """Data type in which the model is loaded: that of the computation for LoRA, float32 if all weights are trained."""
        return torch.bfloat16 if self.method == "lora" and self.dtype == "bfloat16" else torch.float32

    def alone(self, **changes: object) -> TrainSpec:
        """Return the settings of the training without the other fields of a subclass."""
        fields = {name: getattr(self, name) for name in TrainSpec.model_fields if name != "steps" or self.epochs is None}
        return TrainSpec.model_validate({**fields, **changes})

    def rows_per_pass(self, rows: int) -> tuple[int, int]:
        """Return the numbers of training rows and replayed rows in one pass over the data, which is the whole training without `epochs`.

        Args:
            rows: Number of different training rows.
        """
        share = self.replay_share if self.replay else 0
        if self.epochs is not None:
            return rows, round(rows * share / (1 - share))
        total = self.steps * self.batch_size * self.gradient_accumulation_steps
        return total - round(total * share), round(total * share)

    def with_steps(self, rows: int) -> TrainSpec:
        """Return the settings with the number of steps that `epochs` gives for a number of training rows."""
        if self.epochs is None:
            return self
        steps = self.epochs * math.ceil(sum(self.rows_per_pass(rows)) / (self.batch_size * self.gradient_accumulation_steps))
        return self.model_copy(update={"steps": steps})

    def record(self) -> dict[str, object]:
        """Return the settings as a card records them, without unused settings and those that do not affect the result."""
        excluded = {"save_every"} | {name for name in KEYED_IF_SET if getattr(self, name) == TrainSpec.model_fields[name].default}
        excluded |= set() if self.held_out is not None else {"held_out", "evaluate_every", "patience"}
        excluded |= set() if self.orthogonal_to else {"orthogonal_to", "orthogonal"}
        return self.model_dump(mode="json", exclude=excluded)
