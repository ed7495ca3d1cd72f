"""What a growth method gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from workbench.layout import Model
from workbench.registry.steps import Step


class GrowMethod(Step):
    """More parameters. The method names the new tensors and says from which old tensor each is made."""

    verb = "grow"
    preserves: ClassVar[bool] = False
    """Whether the grown model computes the same function; checked on the live models at `run`."""

    def expand(self, model: Model) -> Growth:
        """Plan the growth from names, shapes and configuration alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class Grown:
    """One tensor of a grown model.

    Attributes:
        source: The tensor of the current model that it copies; its values are zeros where `zero` is set.
        new: Whether growth has added it. Bricks do not reach a new tensor.
        zero: Whether it starts as zeros.
    """

    source: str
    new: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Growth:
    """Tensors of the grown model in file order, and its configuration."""

    tensors: dict[str, Grown]
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
