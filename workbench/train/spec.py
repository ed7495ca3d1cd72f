"""train.yaml: the settings of a training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainSpec(BaseModel):
    """What `train.yaml` holds: how one brick is trained. Two equal specs on equal data give equal bricks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str = "train.jsonl"
    """Training rows, {"prompt", "completion"} a line; relative to the folder of train.yaml."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter, `full` every weight."""
    replay: str | None = None
    """Prompts, {"prompt"} a line, that the brick learns to continue as the base does; what follows each is sampled
    from the base before training. Keeps the brick quiet off its skill, and so easier to merge."""
    replay_share: float = Field(0.3, gt=0, lt=1)
    """Part of the rows that are replayed, when `replay` is given."""
    replay_tokens: int = Field(6, ge=1)
    """Tokens sampled after each replayed prompt."""
    rank: int = Field(8, ge=1)
    """Rank of the adapter (LoRA)."""
    alpha: int = Field(16, ge=1)
    """The adapter's update is scaled by alpha / rank (LoRA)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: all linear layers but the output head, or name endings (LoRA)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter (LoRA)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    steps: int = Field(150, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Rows a step."""
    max_length: int = Field(128, ge=8)
    """Most tokens a row may have; a longer row is an error, never cut."""
    warmup: int = Field(10, ge=0)
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    learn_end: bool = True
    """Whether the end of the sequence is learned after each completion. Bricks that answer in a fixed number of
    tokens may leave it out: what they learn about stopping cuts the answers of others short in a merge."""
    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, row order and dropout."""
