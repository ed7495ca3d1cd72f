"""Interface of the files in `run/kinds`, which plan, check and apply each kind of step, and shapes after steps."""

from __future__ import annotations

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from workbench.ground.events import Events, progress
from workbench.ground.files import json_digest, scratch_beside
from workbench.ground.lazy import torch
from workbench.ground.manifest import publish_sealed, reusable, seal
from workbench.ground.parts import imported, parts
from workbench.models.identity import computed_on
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe
from workbench.resolve.output import MemoryAt, RouterAt
from workbench.resolve.resolved import Resolved
from workbench.run.costs import Needs
from workbench.run.record import FactsSaid
from workbench.steps import Step
from workbench.weights.specs import TensorSpec
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter
    from workbench.facts.facts import Fact
    from workbench.grow.expansion.remap import GrownWeights
    from workbench.merge.streaming.deltas import Deltas
    from workbench.steps import GrowMethod, Growth

S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class StepContext:
    """Context of one step while its recipe is composed.

    Attributes:
        resolved: The recipe.
        number: The step's index, from 0.
        device: Device to compute on.
        events: Receives progress.
        deltas: Returns the deltas of a brick, by name.
        adapter: Returns the adapter of a brick, by name; that of a recipe is computed now, unless the cache has it.
        model_before: Composes the model before this step.
        whole_model: Returns the model of a brick, by name, in its own shapes.
    """

    resolved: Resolved
    number: int
    device: torch.device
    events: Events
    deltas: Callable[[str], Deltas]
    adapter: Callable[[str], Adapter]
    model_before: Callable[[], Model]
    whole_model: Callable[[str], Model]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.resolved.recipe

    @property
    def id(self) -> str:
        """The step's id."""
        return self.recipe.step_ids[self.number]

    @property
    def key(self) -> str:
        """Key of the weights after the step."""
        return self.resolved.keys[self.number]

    def place(self, folder: str, *, rounded: bool = False, suffix: str = "") -> Path:
        """Return where the cache keeps what the step computes on this device; see `place_of`."""
        return place_of(self.resolved, folder, self.number, self.device, rounded=rounded, suffix=suffix)

    @contextmanager
    def made(self, place: Path) -> Iterator[Path]:
        """Yield a directory to write for a `with` block, then move it to its place in the cache, sealed.

        Raises:
            InputChangedError: If an input has changed since the step's key was made; nothing is stored then.
        """
        with scratch_beside(place) as folder:
            partial = folder / "made"
            yield partial
            self.resolved.check_inputs()
            publish_sealed(partial, place)

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.recipe.fields.seed

    def say(self, stage: str, text: str) -> None:
        """Send an event of the step."""
        self.events({"stage": stage, "step": self.id, "text": text})

    def progress(self, stage: str) -> Callable[[int, int, str], None]:
        """Return a callback (done, total, text) that sends progress events of the step."""
        return progress(self.events, stage, self.id)


@dataclass(frozen=True)
class Taught:
    """Facts that a step has taught.

    Attributes:
        step: The step's id.
        number: The step's index, from 0.
        model: Weights and configuration after the step.
        facts: The facts.
        memory: Directory of the memory that stores them, if the step made one.
    """

    step: str
    number: int
    model: Model
    facts: Sequence[Fact]
    memory: Path | None = None


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Attributes:
        model: Weights and configuration after the step.
        record: Entries for the step's record in run.json.
        changed: Names, before the step, of the tensors that it changes.
        grown: Result of a grow step.
        report: Returns additional record entries once all tensors have been computed.
        place: Directory in the cache that is copied into the run directory.
        folder: Folder of the run directory for this copy.
        taught: Facts that the step has taught.
        memory: Memory that the step adds to the live model.
        router: Router that the step adds to the live model.
        id: The step's id.
    """

    model: Model
    record: Mapping[str, object]
    changed: Collection[str] = ()
    grown: GrownStep | None = None
    report: Callable[[], dict[str, object]] | None = None
    place: Path | None = None
    folder: str = ""
    taught: Taught | None = None
    memory: MemoryAt | None = None
    router: RouterAt | None = None
    id: str = field(default="", kw_only=True)


class Kind(ABC, Generic[S]):
    """Plans, checks and applies the steps of one kind."""

    cached_in: ClassVar[str] = ""
    """Folder of the cache with what the steps solve, fit or train; empty if they compute nothing ahead."""
    record: ClassVar[str] = ""
    """File that such a result has."""
    rounded: ClassVar[bool] = False
    """True if it is computed on a model with the output's dtype."""

    @abstractmethod
    def plan_row(self, step: S, resolved: Resolved, number: int, model: Model, needs: Needs) -> tuple[dict[str, object], Model]:
        """Predict the resources of a step from headers.

        Args:
            step: The step.
            resolved: The recipe.
            number: The step's index, from 0.
            model: Names, shapes and configuration before the step.
            needs: Resources of the steps before it; those of this step are added in place.

        Returns:
            The plan's row for the step, and the model after the step.
        """

    @abstractmethod
    def apply(self, step: S, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Apply a step to the current weights lazily.

        Args:
            step: The step.
            context: The context of the step.
            current: Weights and configuration before the step.
            earlier: Results of the steps before it.
        """

    def shapes(self, step: S, resolved: Resolved, model: Model) -> Model:
        """Return names, shapes and configuration after a step, from headers. Most steps do not change them.

        Args:
            step: The step.
            resolved: The recipe.
            model: Names, shapes and configuration before the step.
        """
        return model

    def check(self, step: S, context: StepContext) -> dict[str, object] | None:
        """Check the step's promises before anything is written. Return the measurements, or None if there is no check."""
        return None

    def is_cached(self, resolved: Resolved, number: int) -> bool:
        """Return True if the cache has the result that the step solves or trains.

        Without known digests nothing is read for them, because plans read headers alone; the result then counts as missing.
        """
        if not self.cached_in or resolved.headers_only or not resolved.known:
            return False
        return reusable(place_of(resolved, self.cached_in, number, rounded=self.rounded), self.record)

    def keep(self, result: StepResult, run: Path, said: FactsSaid | None) -> None:
        """Copy cached files of a step's result into the run directory, and seal the copy.

        Args:
            result: The step's result.
            run: The run directory.
            said: Counts of the step's facts that the model says.
        """
        if result.place is not None:
            place = run / result.folder / result.id
            shutil.rmtree(place, ignore_errors=True)  # of an interrupted run
            shutil.copytree(result.place, place)
            seal(place)


def place_of(
    resolved: Resolved, folder: str, number: int, device: torch.device | None = None, *, rounded: bool = False, suffix: str = ""
) -> Path:
    """Return where the cache keeps what a step computes on a live model.

    Args:
        resolved: The recipe.
        folder: Folder of the cache.
        number: The step's index, from 0.
        device: Device of the live model; None stands for the one that `--device auto` picks.
        rounded: Whether the model has the output's dtype. Other steps compute on float32 weights, whatever the output is.
        suffix: Ending of the name.
    """
    dtype = [resolved.dtype_name] if rounded else []
    return resolved.cache / folder / f"{json_digest([resolved.keys[number], *dtype, computed_on(device)])}{suffix}"


def kind_of(step: Step) -> Kind[Any]:
    """Return the object that applies a step: `KIND` in the file of `run/kinds` named by the step's `kind`, or the one that a part names."""
    place = f"run.kinds.{step.kind}.KIND"
    if importlib.util.find_spec(f"workbench.run.kinds.{step.kind}") is None:
        place = next((part.kinds[step.kind] for part in parts().values() if step.kind in part.kinds), place)
    kind: Kind[Any] = imported(place)
    return kind


@dataclass
class GrownStep:
    """Result of a grow step in a composition.

    Attributes:
        id: The step's id.
        step: The step, after `GrowMethod.settled`.
        before: The model before growth.
        weights: The grown weights.
        kept: Name of a tensor after the step -> its current name, for tensors that no later step has changed.
    """

    id: str
    step: GrowMethod
    before: Model
    weights: GrownWeights
    kept: dict[str, str]

    def changed(self, names: Iterable[str]) -> None:
        """Record that a later step changes tensors, given by their current names."""
        lost = set(names)
        self.kept = {old: now for old, now in self.kept.items() if now not in lost}

    def renamed(self, growth: Growth) -> None:
        """Record that a later grow step renames tensors that it copies unchanged."""
        places: dict[str, str] = {}
        for name, grown in growth.tensors.items():
            if grown.verbatim:
                places.setdefault(grown.source, name)
        self.kept = {old: places[now] for old, now in self.kept.items() if now in places}


def written_specs(resolved: Resolved) -> dict[str, TensorSpec]:
    """Return the shapes and dtypes of the configuration as a checkpoint, from headers: only growth changes shapes."""
    return output_specs(specs_before(resolved, len(resolved.recipe.steps)), resolved.dtype_name)


def specs_before(resolved: Resolved, steps: int) -> Mapping[str, TensorSpec]:
    """Return the shapes after the first `steps` steps, from headers."""
    return shapes_before(resolved, steps).weights.specs


def shapes_before(resolved: Resolved, steps: int) -> Model:
    """Return names, shapes and configuration after the first `steps` steps, from headers."""
    model = resolved.base
    for step in resolved.recipe.steps[:steps]:
        model = kind_of(step).shapes(step, resolved, model)
    return model


def shapes_of_brick(resolved: Resolved, name: str) -> Model:
    """Return names, shapes and configuration of a brick's whole model, from headers."""
    if name in resolved.nested:
        nested = resolved.nested[name]
        return shapes_before(nested, len(nested.recipe.steps))
    brick = resolved.on_disk[name]
    if brick.kind == "adapter":
        return resolved.base
    if brick.part:
        return Model(brick.whole, brick.whole.config)
    return Model(resolved.vocabulary.view(name) if resolved.vocabulary else brick.checkpoint, brick.checkpoint.config)
