"""Fields of all fuse methods: those of the fused loss, and those of a training."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from workbench.steps import FuseMethod
from workbench.train.step import RowTraining


class Fused(FuseMethod, RowTraining):
    """A fuse step with the fields of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["lora", "full"] = "full"
    """Training method: `full` trains all weights, `lora` trains an adapter. Both are saved in bfloat16."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW. The default is the paper's, for models of 7 billion parameters; small models need a higher one,
    and so does `method: lora`."""

    def names(self) -> list[str]:
        """Return the teachers, and the bricks to which a new adapter is kept orthogonal."""
        return list(dict.fromkeys([*self.teachers, *self.orthogonal_to]))
