"""Fields of all fuse methods: those of the fused loss, and those of a training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from workbench.steps import FuseMethod
from workbench.train.spec import HubData
from workbench.train.step import RowTraining


class Fused(FuseMethod, RowTraining):
    """A fuse step with the fields of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    takes_chat: ClassVar[bool] = False
    """False: teachers read the text itself, without a chat template."""

    data: str | HubData = Field()
    """Training rows: a JSONL file, relative to the project, with {"prompt":, "completion":} or {"text":} a line; or a data set of
    the Hugging Face Hub, {hub:, revision:, config:, split:, prompt:, completion:}. Conversations are refused, because teachers read
    the text without a chat template."""
    method: Literal["lora", "full"] = "full"
    """Training method: `full` trains all weights, `lora` trains an adapter. Both are saved in bfloat16."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW. The default is the paper's, for models of 7 billion parameters; small models need a higher one,
    and so does `method: lora`."""

    def names(self) -> list[str]:
        """Return the teachers, and the bricks to which a new adapter is kept orthogonal."""
        return list(dict.fromkeys([*self.teachers, *self.orthogonal_to]))
