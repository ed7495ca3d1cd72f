"""train.yaml: the settings of a training."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from workbench.yamldoc import Written


class HubData(Written):
    """Training rows from a data set of the hub, or from a folder or file that `datasets` reads (jsonl, parquet, csv)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hub: str = Field(min_length=1)
    """Id on the hub, or a folder or file relative to the folder of train.yaml."""
    revision: str | None = None
    """Commit, tag or branch."""
    config: str | None = None
    """Which of the data set's configurations."""
    split: str = "train"
    """Which split; a part of one too, as `datasets` writes it: train[:1000]."""
    prompt: str | None = None
    """Column of the prompts; omitted: completions are whole texts."""
    completion: str = "completion"
    """Column of what is learned."""


class TrainSpec(Written):
    """What `train.yaml` holds: how one brick is trained. Two equal specs on equal data give equal bricks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str | HubData = "train.jsonl"
    """Training rows, {"prompt", "completion"} or {"text"} a line, relative to the folder of train.yaml; or a data set,
    {hub:, revision:, config:, split:, prompt:, completion:}. A text is learned whole but for its first token."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter, `full` every weight, saved in bfloat16."""
    replay: str | None = None
    """Prompts, {"prompt"} a line of a jsonl relative to the folder of train.yaml, that the brick learns to continue as the base does;
    what follows each is sampled from the base before training, or stands there: {"prompt", "completion"}. Keeps the brick quiet off its
    skill, and so easier to merge."""
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
    held_out: float | str | None = None
    """Rows that are never trained on and whose loss is measured: a share of the prompts between 0 and 1, or a jsonl file
    relative to the folder of train.yaml."""
    evaluate_every: int = Field(10, ge=1)
    """Steps between two measurements of the held-out loss; it is measured before training and at the end too."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many measurements without a lower held-out loss, and keep the weights that had the lowest."""
    save_every: int = Field(50, ge=0)
    """Steps between two saves from which an interrupted training goes on; 0: none."""
    orthogonal_to: tuple[str, ...] = ()
    """Other LoRA bricks, names in bricks/ or directories relative to the folder of train.yaml, whose A matrices the new ones are
    kept orthogonal to (O-LoRA)."""
    orthogonal: float = Field(0.02, ge=0)
    """λ of the orthogonality: the loss gains λ Σ ‖A_i Aᵀ‖² over bricks i and modules. The paper has 0.5, which outweighs the loss on rows
    where many modules are adapted."""
    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, row order and dropout."""

    @field_validator("held_out")
    @classmethod
    def _share(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"expected a share between 0 and 1, or the name of a jsonl file; found {value:g}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.patience is not None and self.held_out is None:
            raise ValueError("patience: expected held_out beside it, whose loss decides when to stop")
        if self.orthogonal_to and self.method == "full":
            raise ValueError("orthogonal_to: expected method lora, found full: a full fine-tune has no A matrices")
        return self

    def record(self) -> dict[str, Any]:
        """The settings as a card records them: what is switched off, or changes no byte, is left out."""
        off = {"save_every"}
        off |= set() if self.held_out is not None else {"held_out", "evaluate_every", "patience"}
        off |= set() if self.orthogonal_to else {"orthogonal_to", "orthogonal"}
        return self.model_dump(mode="json", exclude=off)
