"""Interface of merge methods: declared properties, base class, context and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from workbench.ground.results import JsonObject, absent
from workbench.models.layout import Model
from workbench.steps.fields import MergeWhere
from workbench.steps.step import BrickStep, KeyContext, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.weights.lowrank import Factors
    from workbench.weights.sparse import Rows, Selection
    from workbench.weights.specs import TensorSpec, Weights


class Laws(JsonObject):
    """Properties that a merge method guarantees; a test checks exactly these, and its page lists them."""

    zero_is_base: bool = True
    """If all weights or all deltas are 0, the result is the base."""
    permutation_invariant: bool = True
    """The order of the bricks does not matter."""
    single_is_identity: bool = True
    """One brick with default fields gives that brick's model."""
    linear_in_weight: bool = False
    """Doubling all weights doubles the delta."""
    arity: tuple[int, int | None] = (1, None)
    """Smallest and largest number of bricks; null for any number."""
    passes: int = 1
    """Number of times that every delta is read."""
    spaces: tuple[str, ...] = ("full",)
    """Representations that it can work on: "full" for whole deltas, "core" for the small matrices of stacked LoRA factors."""
    # If it holds, the core space gives the same numbers as whole deltas, and a method that holds whole tensors runs there for adapters.
    rotation_invariant: bool = False
    """If orthogonal matrices rotate all deltas, the result is rotated by them too."""
    exact_rank: bool = False
    """Adapters merge to an adapter whose rank is at most the sum of the bricks' ranks."""
    memory: Literal["stream", "tensor", "model"] = "stream"
    """Memory that it needs at a time: a few blocks, a few copies of one tensor, or a live model."""
    needs: Literal["tensor", "texts", "model"] = "tensor"
    """Inputs besides the weights: none, calibration texts, or a live model run on texts."""
    random: bool = False
    """The method draws random numbers from the recipe's seed."""


class MergeMethod(BrickStep):
    """Combines the deltas of bricks into one delta. `prepare` inspects a tensor and returns a function that computes blocks."""

    kind = "merge"
    verb = "merge"
    merges = True
    version = 2  # every sum rounds each product and each addition on its own
    laws: ClassVar[Laws] = Laws()
    along_arc: ClassVar[bool] = False
    """True if it turns whole tensors, so that a row that is equal in all models gets another length."""

    where: MergeWhere | None = None
    """Tensors to merge: {include:, exclude:, layers:, neurons:}. All other tensors keep their current weights."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield an error for an unknown brick, for too few or too many bricks, and for a brick that is listed twice."""
        yield from super().check_names(names, known)
        path = ("bricks",)
        if not names:
            yield Problem(path, f"{self.name} merges bricks, but the recipe has none", "Add bricks under the recipe's `bricks`.")
            return
        least, most = self.laws.arity
        if not least <= len(names) <= (most or len(names)):
            expected = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            message = f"{self.name} takes {expected} bricks, found {len(names)} ({', '.join(names)})"
            yield Problem(path, message, "List the bricks to merge under the step's `bricks`.")
        if len(set(names)) != len(names):
            yield Problem(path, "a brick is listed twice", "Give it one entry with the sum of the weights.")

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick without low-rank factors, if the step uses `space: core`."""
        for name, kind in kinds.items():
            if self.in_core_space() and kind != "adapter":
                message = f"brick '{name}' is a {kind}, but `space: core` merges the factors of LoRA adapters"
                yield Problem(
                    ("space",), message, "Set `space: full`, or convert it to an adapter with `workbench brick extract`."
                )

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield an error if an exact adapter is requested and the result can have full rank."""
        if not exact:
            return
        dense = [name for name, kind in kinds.items() if kind != "adapter"]
        if not self.keeps_rank():
            spaces = ", or run the step with `space: core`" if "core" in self.laws.spaces else ""
            yield Problem(
                ("merge",),
                f"{step_id}: `rank: exact` needs a sum of the adapters' updates, but the result of {self.name} is not one",
                f"Write `output: {{form: adapter, rank: 16}}` for its best approximation{spaces}.",
            )
        elif dense:
            yield Problem(
                ("merge",),
                f"{step_id}: brick '{dense[0]}' is a {kinds[dense[0]]}, whose delta has full rank; `rank: exact` needs adapters",
                "Write `output: {form: adapter, rank: 16}` for the best approximation; `run` reports its error.",
            )

    def in_core_space(self) -> bool:
        """Return True if the step has `space: core`."""
        return getattr(self, "space", "full") == "core"

    def keeps_rank(self) -> bool:
        """Return True if merging adapters gives an adapter: the method declares it, or the step uses the core space."""
        return self.laws.exact_rank or self.in_core_space()

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the digests of the bricks, and the seed and the digests of files if the method uses them."""
        parts: list[Any] = [context.bricks(self.names())]
        parts += [context.seed] if self.laws.random else []
        if named := self.neuron_set():
            parts.append(context.neurons(named[1]))
        if files := self.inputs():
            parts += [context.files(files), context.tokens(0)]
        return parts

    def neuron_set(self) -> tuple[tuple[str, ...], str] | None:
        """Return the field `where.neurons` and its value, if it is set."""
        return (("where", "neurons"), self.where.neurons) if self.where and self.where.neurons else None

    def listed(self, names: Sequence[str]) -> dict[str, object]:
        """Return `bricks` with an entry for each brick."""
        return {"bricks": {name: self.entry(name).model_dump(mode="json") for name in names}}

    def alters(self, name: str, names: Sequence[str], step_id: str) -> str | None:
        """Return what the merge does with a brick's delta besides adding it, as a relative clause; None if nothing."""
        if other_bricks := [n for n in names if n != name]:
            return f"which step '{step_id}' ({self.name}) merges with {', '.join(other_bricks)}"
        settings = {key: field for key, field in type(self).model_fields.items() if key not in ("id", "bricks", self.verb)}
        default = all(not field.is_required() and getattr(self, key) == field.get_default() for key, field in settings.items())
        if not (self.laws.single_is_identity and default and self.entry(name) == self.entry_type()()):
            return f"which step '{step_id}' ({self.name}) changes before adding it"
        return None

    def measure(self, context: MergeContext) -> Measured:
        """Measure on texts or models, once, before the first tensor. Called if `laws.needs` is "texts" or "model".

        A recipe is composed more than once, so store expensive results in `context.cache`.

        Returns:
            The measurement; `Group.survey` holds its value.
        """
        raise NotImplementedError

    def limits(self, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int], bricks: int) -> Iterator[str]:
        """Yield where the method takes another rule because tensors are small for so many bricks, as sentences for the user.

        Args:
            shapes: Tensor that the step changes -> its shape.
            ranks: Tensor that adapters update -> the largest of their ranks.
            bricks: Number of bricks.
        """
        yield from ()

    def measure_bytes(self, model: Model) -> int:
        """Estimate the bytes of memory that `measure` needs, for `plan`: a live float32 model and its loading, or 0."""
        return 8 * sum(s.numel for s in model.weights.specs.values()) if self.laws.needs == "model" else 0

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Estimate the bytes of memory that one tensor needs in addition to the block buffers, for `plan`."""
        return 4 * model.weights.specs[tensor].numel * (bricks + 4) if self.laws.memory == "tensor" else 0

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Summarize the notes that `prepare` has made for the step's record. Called after all tensors are written."""
        return {}

    def weighs_overlap(self) -> bool:
        """Return True if the bricks' weights are multiplied by those that follow from their overlap."""
        return False

    def takes_arrays(self) -> bool:
        """Return True if compiled loops do all arithmetic on checkpoints and LoRA updates, so that the step can run without torch.

        `prepare` must then pass the buffers of its group to `weights/kernels.py` and `weights/sparse.py` only, and return a
        `Combination` or a `Selection`.
        """
        return False

    def passes(self) -> int:
        """Return the number of times that every delta is read."""
        return self.laws.passes + self.weighs_overlap()

    def moves_base(self) -> bool:
        """Return True if the step also changes tensors that no brick changes."""
        return False

    def survey(self, groups: Iterable[Group]) -> Any:
        """Inspect the whole model before the first tensor, such as for a global threshold. `Group.survey` holds the result."""
        return None

    def prepare(self, group: Group) -> Prepared:
        """Inspect one tensor, which may be read, and return how to compute its delta.

        Returns:
            A function block -> delta [rows, cols], which is added to the current weights. A method that is linear in its bricks
            returns a `Combination` instead, which keeps low rank; a method that drops elements and then sums or elects returns a
            `Selection`. Fused kernels stream both.
        """
        raise NotImplementedError


class OverlapWeighted(MergeMethod):
    """Base of methods that can weigh their bricks by how much they overlap."""

    weights: Literal["auto"] | None = absent()  # left out, so that keys of steps without it stay the same
    """`auto` multiplies each brick's weight by 1 / Σⱼ RVᵢⱼ, so that bricks of the same skill share one weight and bricks of different
    skills keep theirs. RVᵢⱼ is the RV coefficient of two deltas, the mean over the layers' matrices. The step's record and
    `workbench brick advise` show both."""

    def weighs_overlap(self) -> bool:
        """Return True if `weights` is `auto`."""
        return self.weights == "auto"


@dataclass(frozen=True)
class Measured:
    """Measurement of a method on texts or models."""

    value: Any
    """The result; merge methods find it in `Group.survey`."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Entries for the step's record, as plain data."""


@dataclass(frozen=True)
class MergeContext:
    """Everything that a merge method may use to measure on texts and models. Models are loaded on request, one at a time."""

    bricks: list[str]
    """Names of the bricks, in the step's order."""
    keys: Mapping[str, str]
    """Brick ("": the base) -> key of its model, the tokenizer, the device and the libraries; its measurements are cached under this key."""
    base: Model
    """Names, shapes and configuration, which the bricks' models share."""
    weights: Callable[[str], Weights]
    """Returns a brick's model (base plus delta) as lazy weights; "" stands for the base."""
    live: Callable[[str], PreTrainedModel]
    """Loads the same as a live model: float32, on `device`, in eval mode."""
    skeleton: Callable[[], PreTrainedModel]
    """Returns the model without weights: parameters on the meta device, buffers computed."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    project: Path
    cache: Path
    progress: Callable[[int, int, str], None]
    """Callback that takes (done, total, text)."""


@dataclass(frozen=True)
class Combination:
    """The delta Σ wᵢτᵢ + base·θ₀, with one weight per brick."""

    weights: list[float]
    base: float = 0.0


@dataclass(slots=True)
class Block:
    """Consecutive rows of one tensor: the base and the delta of every brick. A method may overwrite the deltas."""

    base: Tensor
    """[rows, cols], float32."""
    deltas: list[Tensor]
    """One [rows, cols] tensor per brick, float32, in the step's order."""
    start: int
    """Index of the first row."""


Prepared: TypeAlias = "Combination | Selection | Callable[[Block], Tensor]"


class Memo:
    """Values that do not depend on brick weights, shared by successive compositions of the same base and bricks, as in a search.

    A key consists of the method's name, the tensor, the brick's key and everything else that determines the value.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...]) -> Any:
        """Return the value of a key; None if there is none."""
        return self._values.get(key)

    def store(self, key: tuple[Any, ...], value: Any) -> None:
        """Store a value for later compositions."""
        self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)


class Group(Protocol):
    """One tensor with the deltas of all bricks, as `MergeMethod.prepare` receives it."""

    tensor: str
    spec: TensorSpec
    """Shape and dtype of the blocks; in the core space those of the small matrices."""
    survey: Any
    """Result of the method's `survey` or `measure`."""
    notes: dict[str, Mapping[str, float]]
    """Tensor name -> name -> number that the method stores for its `report`."""
    device: torch.device
    model: Model
    """The base, whose layers define the depth for schedules."""
    seed: int
    """The recipe's seed."""
    memo: Memo | None
    """Values shared with later compositions; None outside a search."""
    shares: Sequence[float] | None
    """Factor of each brick's weight under `weights: auto`, already part of `values("weight")`; None without it."""

    @property
    def keys(self) -> list[str]:
        """Digest of each brick's content, in the step's order, which seeds random masks and is part of memo keys.

        The first access may read whole bricks, so use it only if the method needs it.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor itself, also in the core space."""

    @property
    def bricks(self) -> list[str]:
        """Names of the bricks, in the step's order."""

    def value(self, field: str) -> float:
        """Return the value of a field of the step, such as "lam", at this tensor."""

    def values(self, field: str) -> list[float]:
        """Return a per-brick field at this tensor, in the step's order. A brick without it takes the step's field."""

    def blocks(self) -> Iterator[Block]:
        """Read the tensor from its start, block by block."""

    def rows(self, start: int, stop: int) -> Rows:
        """Return the rows start..stop as stored, without a check for NaN; the next call overwrites them."""

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise WorkbenchError if rows start..stop contain NaN or infinity."""

    def models(self) -> Iterator[list[Tensor]]:
        """Read the tensor θ of every brick block by block, without a check for NaN, in the stored dtype if it is in a file."""

    def whole(self) -> Block:
        """Return the whole tensor as one block in newly allocated memory, for methods of memory class "tensor"."""

    def factors(self) -> list[Factors | None]:
        """Return the exact low-rank factors of each brick's delta; None for a brick whose delta has none."""
