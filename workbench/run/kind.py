"""What each kind of step does in a run: the contract of the files in `run/kinds`."""

from __future__ import annotations

import importlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from workbench.events import Events, progress
from workbench.facts import Fact
from workbench.merge.streaming.deltas import Deltas
from workbench.models.layout import Model
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolved import MemoryAt, Resolved
from workbench.run.costs import Needs
from workbench.run.grown import GrownStep
from workbench.steps import Step

S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class StepContext:
    """One step of a recipe that is being composed.

    Attributes:
        resolved: The recipe.
        number: The step's number, counted from 0.
        device: Where tensors are computed.
        events: Told of progress.
        deltas: Gives the deltas of one of the recipe's bricks on its base.
        model_before: Composes the model that the steps before this one make.
    """

    resolved: Resolved
    number: int
    device: torch.device
    events: Events
    deltas: Callable[[str], Deltas]
    model_before: Callable[[], Model]

    @property
    def recipe(self) -> Recipe:
        """The recipe as written."""
        return self.resolved.recipe

    @property
    def id(self) -> str:
        """The step's id."""
        return self.recipe.step_ids[self.number]

    @property
    def key(self) -> str:
        """Key of the state after the step."""
        return self.resolved.keys[self.number]

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.recipe.fields.seed

    def told(self, stage: str, text: str) -> None:
        """Send an event of the step."""
        self.events({"stage": stage, "step": self.id, "text": text})

    def progress(self, stage: str) -> Callable[[int, int, str], None]:
        """Return a function (done, total, text) that sends events of the step."""
        return progress(self.events, stage, self.id)


@dataclass(frozen=True)
class Taught:
    """Facts that a step has taught.

    Attributes:
        step: The step's id.
        number: Its number, counted from 0.
        model: Weights and configuration after it.
        facts: The facts.
        memory: Directory of the memory that holds them, where the step made one.
    """

    step: str
    number: int
    model: Model
    facts: Sequence[Fact]
    memory: Path | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step has made.

    Attributes:
        model: Weights and configuration after the step.
        record: What the run says of the step.
        changed: Tensors, by their names before the step, whose numbers it changes.
        grown: What a growth step did.
        report: Gives what the method has to say once the tensors have been computed.
        kept: Directory in the cache that the run keeps a copy of.
        folder: Folder of the run that the copy goes into.
        taught: Facts that the step has taught.
        memory: What acts on the live model beside the weights from now on.
    """

    model: Model
    record: dict[str, Any]
    changed: Collection[str] = ()
    grown: GrownStep | None = None
    report: Callable[[], dict[str, Any]] | None = None
    kept: Path | None = None
    folder: str = ""
    taught: Taught | None = None
    memory: MemoryAt | None = None
    id: str = field(default="", kw_only=True)


class Kind(ABC, Generic[S]):
    """How steps of one kind are planned, checked, applied and kept."""

    @abstractmethod
    def plan_row(self, step: S, resolved: Resolved, number: int, model: Model, needs: Needs) -> tuple[dict[str, Any], Model]:
        """Add what a step needs, from headers alone.

        Args:
            step: The step.
            resolved: The recipe.
            number: The step's number.
            model: Names, shapes and configuration before the step.
            needs: What the steps before it need; changed in place.

        Returns:
            What the plan says of the step, and the model after it.
        """

    @abstractmethod
    def apply(self, step: S, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Wrap the current weights in the step.

        Args:
            step: The step.
            context: Its place in the recipe, and what it may ask for.
            current: Weights and configuration before it.
            earlier: Results of the steps before it.
        """

    def shapes(self, step: S, model: Model, base: Model) -> Model:
        """Return names, shapes and configuration after a step, from headers alone. Most steps change none."""
        return model

    def check(self, step: S, context: StepContext) -> dict[str, Any] | None:
        """Check what the step promises before anything is written; return what was measured, None where nothing is checked."""
        return None

    def is_cached(self, resolved: Resolved, number: int) -> bool:
        """Return whether the cache has what the step solves or trains."""
        return False

    def solving(self, step: S, resolved: Resolved, number: int, model: Model) -> dict[str, Any] | None:
        """Return what solving the step costs, in a recipe that is a brick; None where it solves nothing."""
        return None

    def keep(self, result: StepResult, run: Path, said: Mapping[str, Any] | None) -> None:
        """Copy what the step has made into the run directory.

        Args:
            result: The step's result.
            run: The run directory.
            said: How many of the step's facts the model says.
        """
        if result.kept is not None:
            shutil.copytree(result.kept, run / result.folder / result.id, dirs_exist_ok=True)


def kind_of(step: Step) -> Kind[Any]:
    """Return what applies a step: the `KIND` of the file in `run/kinds` that the step's `kind` names."""
    kind: Kind[Any] = importlib.import_module(f"workbench.run.kinds.{step.kind}").KIND
    return kind
