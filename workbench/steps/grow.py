"""Interface of growth methods: base class, plan of the grown tensors, and context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, PrivateAttr

from workbench.ground.lazy import np
from workbench.models.layout import Model
from workbench.steps.merge import Measured
from workbench.steps.step import BrickStep, KeyContext, Problem
from workbench.steps.training import NewTraining
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Preserves = Literal["exact", "approximate", "no"]
"""exact: every sum has the same terms plus zeros. approximate: the same result up to the rounding of rescaled numbers. no:
neither."""
Learns = Literal["now", "after_one_step", "when_selected"]
NEW = -1
"""Marks a row or column of an `Axis` that growth adds."""


@dataclass(frozen=True)
class Sources:
    """The whole models that a grow step reads beside the current one.

    Attributes:
        models: Brick -> its model, in its own shapes.
        keys: Sort keys of the bricks; see `MergedWeights`.
        contents: Returns the digest of each brick's content. It may read whole bricks.
        seed: The recipe's seed.
    """

    models: Mapping[str, Model]
    keys: Mapping[str, str] = field(default_factory=dict)
    contents: Callable[[], Mapping[str, str]] | None = None
    seed: int = 0


class GrowMethod(BrickStep):
    """Adds or removes parameters. The method lists the tensors of the grown model and the old tensor that each is made from."""

    kind = "grow"
    verb = "grow"
    preserves: ClassVar[Preserves] = "no"
    """Promise that the grown model computes the same function; `run` checks it on live models."""
    learns: ClassVar[Learns] = "now"
    """Promise of when all added parameters have a gradient; checked together with `preserves`."""
    builds: ClassVar[bool] = False
    """True if the method builds the transformers model without weights, which needs the import of transformers."""
    composes: ClassVar[bool] = False
    """True if the result is a multimodal model, whose text decoder is the model before the step."""
    removes: ClassVar[bool] = False
    """True if the method removes tensors or parts of them instead of adding some."""
    random: ClassVar[bool] = False
    """True if the method draws random numbers; the recipe's seed is then part of the step's key."""

    check: Annotated[
        Literal["full", "tensors", "off"],
        # YAML reads an unquoted `off` as false.
        BeforeValidator(lambda value: {False: "off", True: "full"}.get(value, value) if isinstance(value, bool) else value),
    ] = "full"
    """Checks that `run` makes. `tensors`: config.json agrees with the tensors, the written files keep every old element, and the
    logits of two short prompts are unchanged if the method promises that; one decoder layer and the embeddings are in memory at a
    time. `full`: also logits of longer prompts, cached generation, gradients, and loading with transformers; both models are in
    memory in float32. `off`: no check."""

    train: NewTraining | None = None
    """Train the parameters that the step adds, and nothing else. Example: {data: FILE, steps: 100}."""

    def names(self) -> list[str]:
        """Return the names of the bricks that become parts of the model, in order."""
        return list(getattr(self, "bricks", None) or ())

    _whole_sources: Sources = PrivateAttr(default_factory=lambda: Sources({}))

    def with_sources(self, sources: Sources) -> Self:
        """Return the step with the models of the bricks in `whole_models`, which `expand` then reads."""
        bound = self.model_copy()
        bound._whole_sources = sources
        return bound

    def files(self) -> list[str]:
        """Return the files that the method and `train` read."""
        return [*self.inputs(), *(self.train.inputs() if self.train else [])]

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield an error: an adapter cannot add tensors to its base, or remove them."""
        message = f"{step_id} {'removes' if self.removes else 'adds'} tensors, but an adapter can only update tensors of the base"
        yield Problem(("grow",), message, "Write `output: {form: checkpoint}`.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the step's inputs: digests of bricks, files and the tokenizer, the seed, and the result of `binding`."""
        parts: list[Any] = [context.bricks(self.names())] if self.names() else []
        parts += [context.seed] if self.random else []
        parts += [self.binding()] if self.binding() is not None else []
        if (files := self.inputs()) or self.measures():
            parts += [context.files(files), context.tokens(context.number)]
        if self.train:
            parts.append(context.files(self.train.inputs()))
            words = context.wording(self.train.inputs(), context.number + 1)
            parts.append([context.seed, context.tokens(context.number + 1), self.train.version, *words])
        return parts

    def binding(self) -> Any:
        """Return the data that `bind` took from the recipe and that changes the result, as plain data; None if there is none."""
        return None

    def measures(self) -> bool:
        """Return True if the step needs a call of `measure` before `expand`."""
        return False

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Measure tensors of the grown model on texts and live models.

        Args:
            model: The model before growth.
            context: Live models, the tokenizer and the cache.

        Returns:
            Name -> tensor of the grown model, which replaces the one that `expand` describes.
        """
        raise NotImplementedError

    def settled(self, measured: Measured) -> GrowMethod:
        """Return the step with fields that `measure` has determined filled in. `expand` is then called on the returned step."""
        return self

    def promises(self) -> Preserves:
        """Return the promise about the computed function for the step's fields."""
        return self.preserves

    def learning(self) -> Learns:
        """Return when all added parameters have a gradient, for the step's fields."""
        return self.learns

    def is_checked(self) -> bool:
        """Return True if `run` compares live models: `check` is `full`, and the method makes a promise about them."""
        return self.check == "full" and (self.promises() != "no" or self.learning() != "when_selected")

    def expand(self, model: Model) -> Growth:
        """Plan the growth from names, shapes and configuration alone."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Axis:
    """Origin of the rows, or of the columns, of a grown tensor.

    Attributes:
        index: Index of each row or column in the source tensor; `NEW` for one that growth adds.
        scale: Factor of each row or column; None stands for 1.
    """

    index: NDArray[np.int64]
    scale: NDArray[np.float32] | None = None

    @classmethod
    def padded(cls, old: int, new: int) -> Axis:
        """Return an axis with the `old` rows or columns of the source, followed by added ones up to a length of `new`."""
        return cls(np.concatenate([np.arange(old), np.full(new - old, NEW)]))

    @property
    def added(self) -> NDArray[np.bool_]:
        """Mask of the rows or columns that growth adds: those without a source, and second copies of the same source."""
        copies = np.ones(len(self.index), bool)
        copies[np.unique(self.index, return_index=True)[1]] = False
        return copies | np.equal(self.index, NEW)


@dataclass(frozen=True, eq=False)
class Grown:
    """One tensor of a grown model.

    Attributes:
        source: Name of the tensor of the current model that it is made from.
        brick: Name of a brick. The source is then the base's tensor with the brick's delta added.
        model: Name of a model in `Growth.models`, which `source` is a tensor of.
        base: Read `source` from the recipe's base instead of the current model.
        new: Whether the whole tensor is added. Bricks do not change a new tensor.
        zero: Whether the tensor starts as zeros.
        rows, cols: Origin of its rows and columns (a vector has only rows); None leaves them unchanged.
        value: Value of added rows and columns; the mean if `std` is above 0.
        std: Standard deviation of the random values in added rows and columns.
        like: Draw added values with the mean and standard deviation of the source, which takes one more pass over it.
        scale: Factor of all elements that are not added.
        fitted: Whether its elements come from `measure`, which fits them to texts.
        means: Added row -> rows of the source whose mean it takes.
        parts: Tensors that are stacked by rows, or side by side if `shape` has no more rows than one of them. Replaces all other
            fields except `shape`.
        shape: Shape, if it has more than two dimensions; None derives it from the rows and columns.
    """

    source: str
    brick: str | None = None
    model: str | None = None
    base: bool = False
    new: bool = False
    zero: bool = False
    rows: Axis | None = None
    cols: Axis | None = None
    value: float = 0.0
    std: float = 0.0
    like: bool = False
    scale: float = 1.0
    fitted: bool = False
    means: Mapping[int, NDArray[np.int64]] | None = None
    parts: tuple[Grown, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def reshaped(self) -> bool:
        """True if its rows or columns differ from the source's."""
        return self.rows is not None or self.cols is not None or bool(self.parts)

    @property
    def rescaled(self) -> bool:
        """True if old elements are multiplied by a factor, or fitted."""
        return (
            self.fitted or self.scale != 1 or any(axis is not None and axis.scale is not None for axis in (self.rows, self.cols))
        )

    @property
    def verbatim(self) -> bool:
        """True if it is an unchanged copy of the source, possibly under another name."""
        return not (self.new or self.zero or self.brick or self.reshaped or self.rescaled)

    def spec(self, source: TensorSpec) -> TensorSpec:
        """Return its shape and dtype, given those of the source."""
        if self.shape is not None:
            return TensorSpec(self.shape, source.stored)
        if not self.reshaped:
            return source
        rows = source.rows if self.rows is None else len(self.rows.index)
        cols = source.cols if self.cols is None else len(self.cols.index)
        return TensorSpec((rows, cols) if len(source.shape) > 1 else (rows,), source.stored)

    def added(self, source: TensorSpec) -> NDArray[np.bool_] | None:
        """Return the mask of added elements, [rows, cols] or [rows]; None if there are none."""
        if self.new:
            return np.ones(self.spec(source).shape, bool)
        rows = np.zeros(source.rows, bool) if self.rows is None else self.rows.added
        cols = np.zeros(source.cols, bool) if self.cols is None else self.cols.added
        mask = rows[:, None] | cols[None, :]
        return (mask if len(source.shape) > 1 else mask[:, 0]) if mask.any() else None


@dataclass(frozen=True)
class Growth:
    """Plan of a grown model.

    Attributes:
        tensors: Name -> how the tensor is made, in file order.
        config: Its config.json.
        record: Entries for the step's record in run.json.
        tokens: Vocabulary rows that growth adds or assigns to a new token.
        routers: Names of the router tensors.
        models: Name -> model that tensors come from, beside the current one.
    """

    tensors: Mapping[str, Grown]
    config: dict[str, object]
    record: Mapping[str, object] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    routers: tuple[str, ...] = ()
    models: Mapping[str, Model] = field(default_factory=dict)


@dataclass(frozen=True)
class GrowContext:
    """Everything that a growth method may use for measurements. Models are loaded on request, one at a time."""

    live: Callable[[Mapping[str, Grown]], PreTrainedModel]
    """Loads the model before growth, with the given tensors replaced, as a live model: float32, on `device`, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    project: Path
    cache: Path
    """Path of the safetensors file that caches the measurement; its record has the same name with .json."""
    progress: Callable[[int, int, str], None]
    """Callback that takes (done, total, text)."""
    check_inputs: Callable[[], None] = lambda: None
    """Raises an error if an input file has changed; called before a measurement is cached."""
