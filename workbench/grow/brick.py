"""Brick: a new customised brick, trained on the frozen current model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from workbench.steps import TrainMethod, register
from workbench.train.rows import read_replay
from workbench.train.spec import HubData, TrainSpec
from workbench.train.texts import training_cost, training_texts


@register
class NewBrick(TrainMethod, TrainSpec):
    """Train a LoRA adapter, or all weights, on the model that the steps before have made, which stays frozen, and add it.

    The brick is kept with a card (data fingerprint, digest of the weights below it, steps, held-out losses) in the run's `bricks/`, and in
    the cache until the recipe changes below it. `orthogonal_to` keeps its A matrices apart from those of other bricks (Wang et al. 2023,
    O-LoRA). `workbench brick train` does the same on a base, from a train.yaml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685; Wang et al. 2023, Orthogonal Subspace Learning for Language Model Continual Learning, arXiv 2310.14152"
    formula = "θ ↦ θ + w(α/r)BA, A and B trained on frozen θ; loss + λ Σ ‖A_i Aᵀ‖² over bricks i"

    grow: Literal["brick"]
    data: str | HubData = Field()
    """Training rows, {"prompt", "completion"} or {"text"} a line, relative to the project; or a data set,
    {hub:, revision:, config:, split:, prompt:, completion:}. A text is learned whole but for its first token."""
    replay: str | None = None
    """Prompts, {"prompt"} a line, relative to the project, that the brick learns to continue as the model does; what follows each is
    sampled from the model before training, or stands there: {"prompt", "completion"}, a rehearsal."""
    orthogonal_to: tuple[str, ...] = ()
    """LoRA bricks of the recipe that the new one is kept orthogonal to (O-LoRA)."""
    held_out: float | str | None = None
    """Rows that are never trained on and whose loss is measured: a share of the prompts between 0 and 1, or a jsonl file relative to
    the project."""
    seed: int = Field(0, ge=0)
    """Of initialisation, row order and dropout; 0: made of the recipe's `seed` and the step's id."""

    @field_validator("data")
    @classmethod
    def _named(cls, value: str | HubData) -> str | HubData:
        if value == "":
            raise ValueError('expected a jsonl file of training rows, or {hub: "owner/name"}')
        return value

    def names(self) -> list[str]:
        """Bricks that it is kept orthogonal to."""
        return list(self.orthogonal_to)

    def inputs(self) -> list[str]:
        """The files of rows and prompts."""
        return [f for f in (self.data, self.replay, self.held_out) if isinstance(f, str)]

    def check_inputs(self, project: Path) -> None:
        """Errors: a line that is no row. A data set of the hub is read at `run`."""
        if isinstance(self.data, str):
            training_texts(self.settings(0), project / self.data, project)
        if self.replay:
            read_replay(project / self.replay)

    def settings(self, seed: int) -> TrainSpec:
        """The trainer's own settings."""
        seed = self.seed or seed
        fields = {name: getattr(self, name) for name in TrainSpec.model_fields}
        return TrainSpec.model_validate({**fields, "seed": seed})

    def cost(self, project: Path) -> dict[str, Any]:
        """Steps, and about how many tokens go forward and back."""
        return training_cost(self.settings(0), project)
