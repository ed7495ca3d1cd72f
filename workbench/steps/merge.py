"""What a merge method declares, takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from workbench.models.layout import Model
from workbench.steps.fields import Where
from workbench.steps.step import BrickStep, KeyContext, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.weights.lowrank import Factors
    from workbench.weights.sparse import Rows, Selection
    from workbench.weights.specs import TensorSpec, Weights


@dataclass(frozen=True)
class Laws:
    """What holds for a merge method, by its formula. A test checks exactly what is declared; the docs print it."""

    zero_is_base: bool = True
    """All weights 0 (or all deltas 0) give the base."""
    permutation_invariant: bool = True
    """The order of bricks does not matter."""
    single_is_identity: bool = True
    """One brick with default fields gives that brick's model."""
    linear_in_weight: bool = False
    """Doubling all weights doubles the delta."""
    arity: tuple[int, int | None] = (1, None)
    """Least and most bricks that it takes."""
    passes: int = 1
    """How often every delta is read."""
    spaces: tuple[str, ...] = ("full",)
    """Where it may run: on whole deltas, and "core" on the small matrices of stacked LoRA factors (`merge/core.py`)."""
    rotation_invariant: bool = False
    """Turning all deltas by orthogonal matrices turns the result with them. On adapters the core space then gives the same
    numbers as whole deltas, and a method that holds whole tensors is always run there."""
    exact_rank: bool = False
    """Adapters in, adapter out: the delta's rank is at most the sum of the bricks' ranks."""
    memory: Literal["stream", "tensor", "model"] = "stream"
    """What it holds at a time: a few blocks, a few copies of one tensor, or a live model."""
    needs: Literal["tensor", "texts", "model"] = "tensor"
    """What it reads beside the weights: nothing, calibration texts, or a live model on them."""
    random: bool = False
    """Draws random numbers: the recipe's seed is part of the step's key."""


class MergeMethod(BrickStep):
    """Bricks' deltas into one delta. `prepare` looks at one tensor, what it returns computes block by block."""

    kind = "merge"
    verb = "merge"
    verb_order = 0
    merges = True
    version = 2  # every sum rounds each product and each addition on its own
    laws: ClassVar[Laws] = Laws()

    where: Where | None = None
    """Tensors to merge; all others keep their current weights."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield bricks that the recipe does not have, too few or too many of them, one that is listed twice."""
        yield from super().check_names(names, known)
        at = ("bricks",)
        if not names:
            yield Problem(at, f"{self.name} merges bricks, found none", "Name bricks under the recipe's `bricks`.")
            return
        least, most = self.laws.arity
        if not least <= len(names) <= (most or len(names)):
            wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            message = f"{self.name} takes {wanted} bricks, found {len(names)} ({', '.join(names)})"
            yield Problem(at, message, "Name them under the step's `bricks`.")
        if len(set(names)) != len(names):
            yield Problem(at, "a brick is listed twice", "Give it one entry with the sum of the weights.")

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield bricks without low-rank factors, where the step runs in the core space."""
        for name, kind in kinds.items():
            if self.in_core_space() and kind != "adapter":
                message = f"brick '{name}' is a {kind}: `space: core` merges the factors of LoRA adapters"
                yield Problem(("space",), message, "Set `space: full`, or make an adapter of it: `workbench brick extract`.")

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield why the result is not of the rank of the bricks' adapters, where it has to be."""
        if not exact:
            return
        dense = [name for name, kind in kinds.items() if kind != "adapter"]
        if not self.keeps_rank():
            spaces = ", or run the step with `space: core`" if "core" in self.laws.spaces else ""
            yield Problem(
                ("merge",),
                f"{step_id}: the result of {self.name} is no sum of the adapters' updates, and `rank: exact` needs one",
                f"Write `output: {{form: adapter, rank: 16}}` for its best approximation{spaces}.",
            )
        elif dense:
            yield Problem(
                ("merge",),
                f"{step_id}: brick '{dense[0]}' is a {kinds[dense[0]]}, whose delta has full rank; `rank: exact` needs adapters",
                "Write `output: {form: adapter, rank: 16}` for the best approximation; its error is reported.",
            )

    def in_core_space(self) -> bool:
        """Return whether the step says `space: core`."""
        return getattr(self, "space", "full") == "core"

    def keeps_rank(self) -> bool:
        """Return whether adapters give an adapter: by the method's law, or because the step runs on their small matrices."""
        return self.laws.exact_rank or self.in_core_space()

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the bricks' content, and the seed and files where the method uses them."""
        parts: list[Any] = [context.bricks(self.names())]
        parts += [context.seed] if self.laws.random else []
        if files := self.inputs():
            parts += [context.files(files), context.vocabulary(0)]
        return parts

    def listed(self, names: Sequence[str]) -> dict[str, Any]:
        """Return `bricks` with an entry for each of them."""
        return {"bricks": {name: self.entry(name).model_dump(mode="json") for name in names}}

    def alters(self, name: str, names: Sequence[str], step_id: str) -> str | None:
        """Return how the step changes a brick's delta before it adds it; None where it adds the delta as it is.

        Args:
            name: The brick.
            names: All bricks that the step takes.
            step_id: The step's id, for the text.
        """
        if others := [n for n in names if n != name]:
            return f"which step '{step_id}' ({self.name}) merges with {', '.join(others)}"
        settings = {key: field for key, field in type(self).model_fields.items() if key not in ("id", "bricks", self.verb)}
        default = all(not field.is_required() and getattr(self, key) == field.get_default() for key, field in settings.items())
        if not (self.laws.single_is_identity and default and self.entry(name) == self.entry_type()()):
            return f"which step '{step_id}' ({self.name}) does not add as it is"
        return None

    def measure(self, context: MergeContext) -> Measured:
        """What needs texts or a model, once, before the first tensor (`laws.needs`). Its value is kept in `Group.survey`.

        What is expensive goes into `context.cache`: a recipe is composed more than once.
        """
        raise NotImplementedError

    def measure_bytes(self, model: Model) -> int:
        """About how much memory `measure` takes: for `plan`. A live float32 model and room to load it, where one is needed."""
        return 8 * sum(s.numel for s in model.weights.specs.values()) if self.laws.needs == "model" else 0

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """About how much memory one tensor takes beside the block buffers: for `plan`."""
        return 4 * model.weights.specs[tensor].numel * (bricks + 4) if self.laws.memory == "tensor" else 0

    def report(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """What the step's record says of the notes that `prepare` took, once all tensors are written."""
        return {}

    def moves_base(self) -> bool:
        """Whether the step also changes tensors that no brick touches: deltas of 0 do not give the base there."""
        return False

    def survey(self, groups: Iterable[Group]) -> Any:
        """Look at the whole model once, before the first tensor: for thresholds over all tensors. Kept in `Group.survey`."""
        return None

    def prepare(self, group: Group) -> Prepared:
        """Look at one tensor; may read it. Returns block -> delta [rows, cols], to be added to the current weights.

        A method that is linear in its bricks returns a `Combination`, which streams fused and keeps low rank; one that thins
        deltas out and then sums or elects returns a `Selection`, which streams fused.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Measured:
    """What a merge method measured on texts or models: for `Group.survey`, and for the step's record."""

    value: Any
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeContext:
    """What a merge method that needs more than tensors may use. Models are made when asked for, one at a time."""

    bricks: list[str]
    """Names, as the step lists them."""
    keys: Mapping[str, str]
    """Brick -> digest of the base, the brick's content and the tokenizer: what a measurement of its model is cached under."""
    base: Model
    """Names, shapes and configuration; bricks' models have the same."""
    weights: Callable[[str], Weights]
    """A brick's whole model (base plus delta) as lazy weights; of the base itself for ""."""
    live: Callable[[str], PreTrainedModel]
    """The same as a live model: float32, on `device`, in eval mode."""
    skeleton: Callable[[], PreTrainedModel]
    """The model without weights: parameters on the meta device, buffers computed."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    project: Path
    cache: Path
    progress: Callable[[int, int, str], None]
    """(done, total, text)"""


@dataclass(frozen=True)
class Combination:
    """The delta Σ wᵢτᵢ + base·θ₀, one weight a brick."""

    weights: list[float]
    base: float = 0.0


@dataclass(slots=True)
class Block:
    """Some rows of one tensor: the base and every brick's delta. A method may overwrite the deltas."""

    base: Tensor
    """[rows, cols], float32."""
    deltas: list[Tensor]
    """One [rows, cols] a brick, float32, in the step's order."""
    start: int
    """Index of the first row."""


Prepared: TypeAlias = "Combination | Selection | Callable[[Block], Tensor]"


class Memo:
    """What methods find of a brick's tensor whatever its weight, kept while one composition after the other is made of the same base
    and bricks. A method asks by name, tensor, brick's key and whatever else decides the value."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...]) -> Any:
        """What was kept; None if nothing was."""
        return self._found.get(key)

    def keep(self, key: tuple[Any, ...], value: Any) -> None:
        """Keep a value for later compositions."""
        self._found[key] = value

    def __len__(self) -> int:
        return len(self._found)


class Group(Protocol):
    """One tensor as a merge method sees it before it computes."""

    tensor: str
    spec: TensorSpec
    """Of the blocks; in the core space that of the small matrices."""
    survey: Any
    """What the method's `survey` or `measure` found."""
    notes: dict[str, Any]
    """Tensor name -> plain data that the method notes for its `report`."""
    device: torch.device
    model: Model
    """The base: its layers give schedules their depth."""
    seed: int
    """The recipe's."""
    memo: Memo | None
    """Where what does not depend on weights is kept for the next composition; None where there is none."""

    @property
    def keys(self) -> list[str]:
        """Digest of each brick's whole content, in the step's order: random masks are drawn from it and the memo is asked with it.
        The first call may read whole bricks, so only a method that needs it asks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor itself."""

    @property
    def bricks(self) -> list[str]:
        """Names of the bricks, in the step's order."""

    def value(self, field: str) -> float:
        """The step's field at this tensor: "lam"."""

    def values(self, field: str) -> list[float]:
        """A per-brick field at this tensor, in the step's order; where a brick says nothing, the step's field of that name."""

    def blocks(self) -> Iterator[Block]:
        """Read the tensor from its start, in blocks."""

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start..stop as they lie, unchecked; the next call overwrites them."""

    def refuse_non_finite(self, start: int, stop: int) -> None:
        """Raise for the first NaN or infinity in rows start..stop, if there is one."""

    def models(self) -> Iterator[list[Tensor]]:
        """Every brick's own tensor θ, block by block from its start; unchecked, in the stored dtype where it lies in a file."""

    def whole(self) -> Block:
        """The tensor as one block, in memory of its own: for methods of memory class "tensor"."""

    def factors(self) -> list[Factors | None]:
        """Every brick's delta as a low-rank product, exactly; None where it is not one."""
