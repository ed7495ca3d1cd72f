"""What every step of a recipe is, and what the rest of the workbench asks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, get_args

from pydantic import Field

from workbench.errors import nearest
from workbench.steps.fields import NAME, BrickEntry, Strict

if TYPE_CHECKING:
    from workbench.models.layout import Model
    from workbench.steps.new_training import NewTraining


VERBS: dict[str, int] = {}
"""Verb -> its place in lists of methods. Each kind of step adds its own when its class is made."""


class Problem(NamedTuple):
    """What is wrong with a step.

    Attributes:
        path: Keys below the step that lead to the place.
        message: What is wrong.
        hint: What to do about it.
    """

    path: tuple[str | int, ...]
    message: str
    hint: str | None = None


class KeyContext(Protocol):
    """What a step may make its key of, beside its own fields."""

    @property
    def number(self) -> int:
        """The step's number in the recipe, counted from 0."""

    @property
    def seed(self) -> int:
        """The recipe's seed."""

    def bricks(self, names: Sequence[str] | None) -> list[list[str]]:
        """Return [name, digest] of bricks; None stands for all bricks of the recipe."""

    def files(self, names: Sequence[str]) -> list[str]:
        """Return the digest of each input file."""

    def vocabulary(self, steps: int) -> str | None:
        """Return the digest of the vocabulary after the first `steps` steps."""


class Step(Strict):
    """One step of a recipe: `{merge|edit|grow: METHOD}` and the method's fields."""

    id: str | None = Field(None, pattern=NAME)
    """Name of the step, for `--set ID.FIELD=VALUE` and the run's record; default: verb and method."""

    kind: ClassVar[str]
    """Names the file of `run/kinds` that applies the step."""
    verb: ClassVar[str]
    verb_order: ClassVar[int] = 9
    """Place of the verb in lists of methods."""
    name: ClassVar[str]
    tag: ClassVar[str]
    paper: ClassVar[str] = ""
    """Where the method comes from."""
    formula: ClassVar[str] = ""
    """The method in a line."""
    version: ClassVar[int] = 1
    """Part of every cache key: raise it when numbers change."""
    unkeyed: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide no number of the result, and are part of no key."""
    merges: ClassVar[bool] = False
    """Whether the step adds bricks' deltas to the current weights."""
    ends_recipe: ClassVar[bool] = False
    """Whether no step can follow: the result is no set of weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Add the verb of a new kind of step to `VERBS`."""
        super().__init_subclass__(**options)
        if "verb" in vars(cls):
            VERBS.setdefault(cls.verb, cls.verb_order)

    @property
    def efficacy_gate(self) -> float | None:
        """Share of the step's facts that the model has to say for a run to succeed; None for steps that teach no facts."""
        return None

    @property
    def training(self) -> NewTraining | None:
        """How the parameters that the step adds are trained; None where they are not."""
        return None

    def names(self) -> list[str] | None:
        """Return the names of the bricks that the step takes, in order; None stands for all bricks of the recipe."""
        return []

    def inputs(self) -> list[str]:
        """Return the files that the method reads, relative to the project; their content is part of the step's key."""
        return []

    def files(self) -> list[str]:
        """Return all files that the step reads, relative to the project."""
        return self.inputs()

    def check_inputs(self, project: Path) -> None:
        """Read the step's files once, before any work. Raises WorkbenchError if their content cannot be used."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield what is wrong with the bricks that the step names.

        Args:
            names: The bricks that the step takes, in order.
            known: The recipe's bricks.
        """
        for name in names:
            if name not in known:
                yield Problem(("bricks", name), f"no brick '{name}' under `bricks`. {nearest(name, known)}")

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield the bricks that the step cannot take because of their kind.

        Args:
            kinds: Brick that the step takes -> adapter, checkpoint or recipe.
        """
        yield from ()

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield why an adapter of the base cannot hold the step's result.

        Args:
            kinds: Brick that the step takes -> adapter, checkpoint or recipe.
            exact: Whether the adapter has to hold the result exactly, not its best approximation.
            step_id: The step's id, for messages.
        """
        yield from ()

    def keeps_rank(self) -> bool:
        """Return whether adapters as inputs give a result that is a product of their factors."""
        return True

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return what the step's numbers depend on beside the weights before it, its fields and its version."""
        return []

    def listed(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields that stand for the step's bricks whether or not it lists them; `names` are the bricks that it takes."""
        return {}

    def alters(self, name: str, names: Sequence[str], step_id: str) -> str | None:
        """Return how the step changes a brick's delta before it adds it; None where it adds the delta as it is.

        Args:
            name: The brick.
            names: All bricks that the step takes.
            step_id: The step's id, for the text.
        """
        return None

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[Self, Path]:
        """Return the step with what it takes from the recipe, and the directory of the tokenizer after it.

        Args:
            base: What deltas of bricks refer to.
            tokenizer: Directory of the tokenizer before the step.
            project: Folder that the step's files are relative to.
            cache: The project's cache; a new tokenizer is written there.
        """
        return self, tokenizer


class BrickStep(Step):
    """A step that may take bricks."""

    def names(self) -> list[str] | None:
        """Return the names of the bricks that the step takes, in order; None stands for all bricks of the recipe."""
        bricks = getattr(self, "bricks", None)
        return None if bricks is None else list(bricks)

    def entry(self, brick: str) -> BrickEntry:
        """Return the step's fields for one brick."""
        bricks = getattr(self, "bricks", None)
        if not isinstance(bricks, dict) or brick not in bricks:
            return self.entry_type()()
        given = bricks[brick]
        return given if isinstance(given, BrickEntry) else self.entry_type()(weight=given)

    @classmethod
    def entry_type(cls) -> type[BrickEntry]:
        """Return the class of a brick's fields, which the annotation of `bricks` names."""
        stack: list[Any] = [cls.model_fields["bricks"].annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, BrickEntry):
                return kind
            stack.extend(get_args(kind))
        return BrickEntry
