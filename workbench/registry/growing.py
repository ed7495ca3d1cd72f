"""What a growth method gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from workbench.layout import Model
from workbench.registry.steps import Step
from workbench.weights.specs import TensorSpec

Preserves = Literal["exact", "approximate", "no"]
"""exact: every sum has the same terms and zeros beside them; approximate: the same up to rounding of rescaled numbers."""
Learns = Literal["now", "after_one_step", "when_selected"]
NEW = -1
"""In an `Axis`: a row or column that growth adds."""


def _said(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return {False: "off", True: "full"}.get(value, value) if isinstance(value, bool) else value


class GrowMethod(Step):
    """More parameters. The method names the new tensors and says from which old tensor each is made."""

    verb = "grow"
    preserves: ClassVar[Preserves] = "no"
    """Whether the grown model computes the same function; checked on the live models at `run`."""
    learns: ClassVar[Learns] = "now"
    """When all that growth adds has a gradient; checked with the function."""

    check: Annotated[Literal["full", "off"], BeforeValidator(_said)] = "full"
    """full: compare logits, cached generation and gradients with the model before growth, at `run`; needs both in memory, in float32."""

    def promises(self) -> Preserves:
        """What holds with these fields."""
        return self.preserves

    def expand(self, model: Model) -> Growth:
        """Plan the growth from names, shapes and configuration alone."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the rows, or the columns, of a grown tensor come from.

    Attributes:
        index: For each of them the source's; `NEW` where growth adds one.
        scale: Factor of each; None: 1.
    """

    index: NDArray[np.int64]
    scale: NDArray[np.float32] | None = None

    @classmethod
    def padded(cls, old: int, new: int) -> Axis:
        """The old ones, then added ones."""
        return cls(np.concatenate([np.arange(old), np.full(new - old, NEW)]))

    @property
    def added(self) -> NDArray[np.bool_]:
        """Which ones growth adds."""
        return np.equal(self.index, NEW)


@dataclass(frozen=True, eq=False)
class Grown:
    """One tensor of a grown model.

    Attributes:
        source: The tensor of the current model that it is made from.
        new: Whether growth has added it whole. Bricks do not reach a new tensor.
        zero: Whether it starts as zeros.
        rows, cols: Its rows and columns by those of the source (a vector has rows alone); None: as they are.
        value: Of rows and columns that are added; where `std` is above 0 they are drawn around it instead.
        std: Standard deviation of what is drawn.
        like: Draw with the mean and the standard deviation of the source instead, which takes one more pass over it.
        scale: Factor of what is not added.
        parts: Instead of all that: tensors whose rows it is made of, one upon another, in the shape `shape`.
    """

    source: str
    new: bool = False
    zero: bool = False
    rows: Axis | None = None
    cols: Axis | None = None
    value: float = 0.0
    std: float = 0.0
    like: bool = False
    scale: float = 1.0
    parts: tuple[Grown, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def reshaped(self) -> bool:
        """Whether its rows or columns are others than the source's."""
        return self.rows is not None or self.cols is not None or bool(self.parts)

    def spec(self, source: TensorSpec) -> TensorSpec:
        """Its shape and dtype."""
        if self.shape is not None:
            return TensorSpec(self.shape, source.dtype)
        if not self.reshaped:
            return source
        rows = source.rows if self.rows is None else len(self.rows.index)
        cols = source.cols if self.cols is None else len(self.cols.index)
        return TensorSpec((rows, cols) if len(source.shape) > 1 else (rows,), source.dtype)

    def added(self, source: TensorSpec) -> NDArray[np.bool_] | None:
        """Which of its elements growth adds, [rows, cols] or [rows]; None: none of them."""
        if self.new:
            return np.ones(self.spec(source).shape, bool)
        rows = np.zeros(source.rows, bool) if self.rows is None else self.rows.added
        cols = np.zeros(source.cols, bool) if self.cols is None else self.cols.added
        found = rows[:, None] | cols[None, :]
        return (found if len(source.shape) > 1 else found[:, 0]) if found.any() else None


@dataclass(frozen=True)
class Growth:
    """Tensors of the grown model in file order, and its configuration."""

    tensors: Mapping[str, Grown]
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
