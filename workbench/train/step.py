"""Fields and files that all steps share which train on rows of a file or a data set."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, Field, field_validator

from workbench.steps import TrainMethod
from workbench.train.rows import read_replay
from workbench.train.spec import KEYED_IF_SET, HubData, TrainSpec
from workbench.train.texts import training_cost, training_texts


class RowTraining(TrainMethod, TrainSpec):
    """A step that trains on rows of a file or a data set, with the fields of train.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    keyed_if_set: ClassVar[frozenset[str]] = KEYED_IF_SET
    takes_chat: ClassVar[bool] = True
    """True if conversations are read; other rows always are."""

    data: str | HubData = Field()
    """Training rows: a JSONL file, relative to the project, with {"prompt":, "completion":}, {"text":} or {"messages":} a line; or a
    data set of the Hugging Face Hub, {hub:, revision:, config:, split:, prompt:, completion:, messages:, tools:}. For a prompt the loss
    covers the completion, for a text every token but the first, and for a conversation its answers, each as a row of its own."""
    replay: str | None = None
    """JSONL file of prompts, relative to the project, that the brick learns to continue as the frozen model does. A line
    {"prompt":} gets a completion sampled from the model before training; a line {"prompt":, "completion":} is used as it is."""
    orthogonal_to: tuple[str, ...] = ()
    """Names of LoRA bricks of the recipe to which the new brick is kept orthogonal (O-LoRA)."""
    held_out: float | str | None = None
    """Rows that are not trained on and whose loss is measured: a share of the prompts between 0 and 1, or a JSONL file, relative
    to the project."""
    seed: int = Field(0, ge=0)
    """Seed of initialization, row order and dropout. 0 derives it from the recipe's `seed` and the step's id."""

    @field_validator("data")
    @classmethod
    def _check_data(cls, value: str | HubData) -> str | HubData:
        if value == "":
            raise ValueError('expected a JSONL file of training rows, or {hub: "owner/name"}')
        return value

    @property
    def always_chat(self) -> bool:
        """True if a column of conversations is read."""
        return isinstance(self.data, HubData) and self.data.messages is not None

    def names(self) -> list[str]:
        """Return the bricks to which the new one is kept orthogonal."""
        return list(self.orthogonal_to)

    def inputs(self) -> list[str]:
        """Return the files of rows and prompts."""
        return [f for f in (self.data, self.replay, self.held_out) if isinstance(f, str)]

    def check_inputs(self, project: Path) -> None:
        """Check every line of the files; a data set of the Hub is read only at `run`.

        Raises:
            WorkbenchError: If a line is not a valid row.
        """
        if isinstance(self.data, str):
            training_texts(self.settings(0), project / self.data, project, chat=self.takes_chat)
        if self.replay:
            read_replay(project / self.replay)

    def settings(self, seed: int) -> TrainSpec:
        """Return the settings of the trainer; `seed` is used unless the step sets its own."""
        return self.alone(seed=self.seed or seed)

    def cost(self, project: Path) -> dict[str, int]:
        """Return the number of training steps and an estimate of the tokens in the forward and backward passes."""
        return training_cost(self.settings(0), project)
