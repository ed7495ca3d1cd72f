"""What a growth method gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from workbench.models.layout import Model
from workbench.steps.merge import Measured
from workbench.steps.new_training import NewTraining
from workbench.steps.step import BrickStep, KeyContext, Problem
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Preserves = Literal["exact", "approximate", "no"]
"""exact: every sum has the same terms and zeros beside them; approximate: the same up to rounding of rescaled numbers."""
Learns = Literal["now", "after_one_step", "when_selected"]
NEW = -1
"""In an `Axis`: a row or column that growth adds."""


def _said(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return {False: "off", True: "full"}.get(value, value) if isinstance(value, bool) else value


class GrowMethod(BrickStep):
    """More parameters. The method names the new tensors and says from which old tensor each is made."""

    kind = "grow"
    verb = "grow"
    verb_order = 2
    preserves: ClassVar[Preserves] = "no"
    """Whether the grown model computes the same function; checked on the live models at `run`."""
    learns: ClassVar[Learns] = "now"
    """When all that growth adds has a gradient; checked with the function."""
    builds: ClassVar[bool] = False
    """Asks transformers for the model without weights, which takes its import."""
    random: ClassVar[bool] = False
    """Draws random numbers: the recipe's seed is part of the step's key."""

    check: Annotated[Literal["full", "tensors", "off"], BeforeValidator(_said)] = "full"
    """What `run` checks. tensors: config.json and the tensors agree; on two short prompts the grown model gives the logits of the model before
    it, where the method promises that, with one decoder layer beside the embeddings in memory at a time; all old elements lie in the files
    bit for bit. full: that, and logits of longer prompts, cached generation, gradients, and the files as transformers loads them, which takes
    both models in memory in float32. off: nothing."""

    train: NewTraining | None = None
    """Train what the step has added, and nothing else: {data: FILE, steps: 100}."""

    def names(self) -> list[str]:
        """Bricks that become a part of the model of their own, in order."""
        return list(getattr(self, "bricks", None) or ())

    @property
    def training(self) -> NewTraining | None:
        """How the parameters that the step adds are trained; None where they are not."""
        return self.train

    def files(self) -> list[str]:
        """Return the method's files, and those that `train` reads."""
        return [*self.inputs(), *(self.train.inputs() if self.train else [])]

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield that the step adds tensors."""
        message = f"{step_id} adds tensors, and an adapter holds updates of the base's own"
        yield Problem(("grow",), message, "Write `output: {form: checkpoint}`.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the bricks' content and all that the step reads, draws, binds and trains on."""
        parts: list[Any] = [context.bricks(self.names())] if self.names() else []
        parts += [context.seed] if self.random else []
        parts += [self.binding()] if self.binding() is not None else []
        if (files := self.inputs()) or self.measures():
            parts += [context.files(files), context.vocabulary(context.number)]
        if self.train:
            parts.append(context.files(self.train.inputs()))
            parts.append([context.seed, context.vocabulary(context.number + 1), self.train.version])
        return parts

    def binding(self) -> Any:
        """What `bind` took that the step's numbers depend on; None: nothing."""
        return None

    def measures(self) -> bool:
        """Whether `measure` is to be asked."""
        return False

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """What needs texts and live models: name -> tensor of the grown model, in place of what `expand` says of it.

        Args:
            model: Before growth.
        """
        raise NotImplementedError

    def settled(self, measured: Measured) -> GrowMethod:
        """The step with what `measure` found in the place of what it was asked to find: `expand` is asked of that one."""
        return self

    def promises(self) -> Preserves:
        """What holds with these fields."""
        return self.preserves

    def learning(self) -> Learns:
        """Return when everything that the step adds has a gradient, with these fields."""
        return self.learns

    def is_checked(self) -> bool:
        """Whether live models are compared: the method promises something of them, and it is wanted."""
        return self.check == "full" and (self.promises() != "no" or self.learning() != "when_selected")

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
        """Which ones growth adds: those without a source, and copies of one that has its place already."""
        found = np.ones(len(self.index), bool)
        found[np.unique(self.index, return_index=True)[1]] = False
        return found | np.equal(self.index, NEW)


@dataclass(frozen=True, eq=False)
class Grown:
    """One tensor of a grown model.

    Attributes:
        source: The tensor of the current model that it is made from.
        brick: Take what a brick makes of the base's tensor instead, where the source is one of the base's.
        base: Read the recipe's base, whose tensor `source` then is, in place of the current model.
        new: Whether growth has added it whole. Bricks do not reach a new tensor.
        zero: Whether it starts as zeros.
        rows, cols: Its rows and columns by those of the source (a vector has rows alone); None: as they are.
        value: Of rows and columns that are added; where `std` is above 0 they are drawn around it instead.
        std: Standard deviation of what is drawn.
        like: Draw with the mean and the standard deviation of the source instead, which takes one more pass over it.
        scale: Factor of what is not added.
        means: Rows that are added, as means of rows of the source: row -> those rows.
        parts: Instead of all that: tensors whose rows it is made of, one upon another, in the shape `shape`; side by side where that has
            no more rows than one of them.
        shape: Of more than two dimensions; None: that of the rows and columns.
    """

    source: str
    brick: str | None = None
    base: bool = False
    new: bool = False
    zero: bool = False
    rows: Axis | None = None
    cols: Axis | None = None
    value: float = 0.0
    std: float = 0.0
    like: bool = False
    scale: float = 1.0
    means: Mapping[int, NDArray[np.int64]] | None = None
    parts: tuple[Grown, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def reshaped(self) -> bool:
        """Whether its rows or columns are others than the source's."""
        return self.rows is not None or self.cols is not None or bool(self.parts)

    @property
    def rescaled(self) -> bool:
        """Whether old elements are multiplied by something."""
        return self.scale != 1 or any(axis is not None and axis.scale is not None for axis in (self.rows, self.cols))

    @property
    def verbatim(self) -> bool:
        """Whether it is the source as it was, under another name at most."""
        return not (self.new or self.zero or self.brick or self.reshaped or self.rescaled)

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
    """A grown model.

    Attributes:
        tensors: In file order.
        config: Its config.json.
        record: What the run says of it.
        tokens: Rows of the vocabulary that growth adds, or gives to a new token.
        routers: The tensors of routers.
    """

    tensors: Mapping[str, Grown]
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    routers: tuple[str, ...] = ()


@dataclass(frozen=True)
class GrowContext:
    """What a growth method that needs more than tensors may use. Models are made when asked for, one at a time."""

    live: Callable[[Mapping[str, Grown]], PreTrainedModel]
    """The model before growth with some of its tensors replaced, as a live model: float32, on `device`, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    project: Path
    cache: Path
    """A file for what was measured: a safetensors file and, beside it, a record."""
    progress: Callable[[int, int, str], None]
    """(done, total, text)"""
    check_inputs: Callable[[], None] = lambda: None
    """Raises if an input file changed; called before a measurement is kept."""
