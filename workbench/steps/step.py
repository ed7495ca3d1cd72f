"""Base class of recipe steps, the interface that the rest of the workbench uses, and the registry of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar, get_args

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from workbench.ground.errors import nearest
from workbench.ground.trust import Plugin
from workbench.steps.fields import NAME, BrickEntry, Strict

if TYPE_CHECKING:
    from workbench.models.layout import Model


VERBS = ["merge", "edit", "grow", "fuse", "route"]
"""The verbs in the order of lists of methods. The class of a new kind of step adds its own."""


class Problem(NamedTuple):
    """An error in a step.

    Attributes:
        path: Path of keys below the step to the wrong field.
        message: Description of the error.
        hint: Command or edit that fixes it.
    """

    path: tuple[str | int, ...]
    message: str
    hint: str | None = None


class KeyContext(Protocol):
    """Digests and settings that a step may add to its key."""

    @property
    def number(self) -> int:
        """The step's index in the recipe, from 0."""

    @property
    def seed(self) -> int:
        """The recipe's seed."""

    def bricks(self, names: Sequence[str] | None) -> list[list[str]]:
        """Return [name, digest] of each named brick; None stands for all bricks of the recipe."""

    def wording(self, names: Sequence[str] | None, steps: int) -> list[str]:
        """Return the digest of the chat template after the first `steps` steps, if it words conversations in the input files.

        Args:
            names: The files; None if conversations are read in any case.
            steps: Number of steps.

        Returns:
            A list with the digest, or an empty list, so that keys of steps without conversations stay.
        """

    def files(self, names: Sequence[str]) -> list[str]:
        """Return the digest of each input file."""

    def tokens(self, steps: int) -> str | None:
        """Return the digest of what turns text into tokens after the first `steps` steps."""

    def brick_tokens(self, names: Sequence[str]) -> list[str | None]:
        """Return the same digest for each named brick's whole model."""

    def neurons(self, folder: str) -> str:
        """Return the digest of a set of neurons."""


class Step(Strict):
    """One step of a recipe: `{merge|edit|grow|route: METHOD}` and the method's fields."""

    id: str | None = Field(None, pattern=NAME)
    """Name of the step in `--set ID.FIELD=VALUE` and in the run's record. If omitted, the verb and the method, such as
    "merge-ties"."""

    kind: ClassVar[str]
    """Name of the file in `run/kinds` that applies the step."""
    verb: ClassVar[str]
    name: ClassVar[str]
    tag: ClassVar[str]
    paper: ClassVar[str] = ""
    """Paper or other source of the method."""
    formula: ClassVar[str] = ""
    """Formula of the method, in one line."""
    version: ClassVar[int] = 1
    """Version of the computation, part of every cache key. Raise it when numbers change."""
    unkeyed: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change the result and are not part of any key."""
    keyed_if_set: ClassVar[frozenset[str]] = frozenset()
    """Fields that are part of keys only where they differ from their defaults, so that recipes without them keep their keys."""
    page: ClassVar[str] = ""
    """Name of the page that describes all methods of a family, which share their fields; empty: a page of its own."""
    constants: ClassVar[Mapping[str, object]] = {}
    """Fields of earlier versions -> the value that they always have now. They stay part of keys and records, so that recipes keep
    their keys, and records with this value are read again."""
    plugin: ClassVar[Plugin | None] = None
    """Origin of a method outside this package; None for built-in methods."""
    merges: ClassVar[bool] = False
    """True if the step adds deltas of bricks to the current weights."""
    low_rank_bricks: ClassVar[bool] = False
    """True if every brick of the step must be a low-rank update of linear layers."""
    ends_recipe: ClassVar[bool] = False
    """True if no step can follow, because the result is not weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Add the verb of a new kind of step to `VERBS`."""
        super().__init_subclass__(**options)
        if "verb" in vars(cls) and cls.verb not in VERBS:
            VERBS.append(cls.verb)

    @model_validator(mode="before")
    @classmethod
    def _without_constants(cls, data: Any) -> Any:
        """Leave out fields of earlier versions that have their only value, as records list them."""
        if not cls.constants or not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if key not in cls.constants or value != cls.constants[key]}

    @classmethod
    def code_key(cls) -> int | list[Any]:
        """Return the part of cache keys that stands for the method's code: its version, and the digest of a plug-in."""
        return [cls.version, cls.plugin.digest] if cls.plugin else cls.version

    @property
    def efficacy_gate(self) -> float | None:
        """Smallest share of the step's facts that the model must say for a run to succeed; None for steps that teach no facts."""
        return None

    def names(self) -> list[str] | None:
        """Return the names of the bricks that the step uses, in order; None stands for all bricks of the recipe."""
        return []

    def whole_models(self) -> list[str]:
        """Return the names of the bricks that the step reads as whole models, in their own shapes, not as deltas from the base."""
        return []

    def teacher_bricks(self) -> list[str]:
        """Return the names of the bricks that the step only learns from, so that they need not fit the base."""
        return []

    def tokenizer_brick(self) -> str | None:
        """Return the name of the brick whose tokenizer the result has after the step; None if the tokenizer stays."""
        return None

    def inputs(self) -> list[str]:
        """Return the files that the method reads, relative to the project. Their content is part of the step's key."""
        return []

    def files(self) -> list[str]:
        """Return all files that the step reads, relative to the project."""
        return self.inputs()

    def completed(self, known: Sequence[str]) -> Self:
        """Return the step with what it takes from the rest of the recipe, before references are checked."""
        return self

    def neuron_set(self) -> tuple[tuple[str, ...], str] | None:
        """Return the field that names a set of neurons, as a path of keys, and the set's directory; None if the step uses no set."""
        return None

    def check_inputs(self, project: Path) -> None:
        """Read the step's files once, before any computation. Raises WorkbenchError if a file is invalid."""

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names of the step.

        Args:
            names: The bricks that the step uses, in order.
            known: The recipe's bricks.
        """
        for name in names:
            if name not in known:
                yield Problem(("bricks", name), f"no brick '{name}' under `bricks`. {nearest(name, known)}")

    def warnings(self, names: Sequence[str]) -> Iterator[str]:
        """Yield settings that are allowed but rarely meant, as sentences for the user.

        Args:
            names: The bricks that the step uses, in order.
        """
        yield from ()

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick whose kind the step cannot use.

        Args:
            kinds: Brick that the step uses -> adapter, checkpoint or recipe.
        """
        yield from ()

    def check_adapter(self, kinds: Mapping[str, str], exact: bool, step_id: str) -> Iterator[Problem]:
        """Yield an error if an adapter of the base cannot represent the step's result.

        Args:
            kinds: Brick that the step uses -> adapter, checkpoint or recipe.
            exact: Whether the adapter must represent the result exactly; otherwise its best approximation is enough.
            step_id: The step's id, for messages.
        """
        yield from ()

    def keeps_rank(self) -> bool:
        """Return True if adapters as inputs give a result that is a product of their factors."""
        return True

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return what determines the step's result besides the weights before it, its fields and its version."""
        return []

    def listed(self, names: Sequence[str]) -> dict[str, object]:
        """Return the step's brick fields with every brick listed, so that a step that omits the list gives the same key.

        Args:
            names: The bricks that the step uses.
        """
        return {}

    def alters(self, name: str, names: Sequence[str], step_id: str) -> str | None:
        """Return how the step changes a brick's delta before adding it, as a relative clause; None if it does not change it.

        Args:
            name: The brick.
            names: All bricks that the step uses.
            step_id: The step's id, for the text.
        """
        return None

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[Self, Path]:
        """Return the step with the data that it takes from the recipe, and the directory of the tokenizer after it.

        Args:
            base: The recipe's base.
            tokenizer: Directory of the tokenizer before the step.
            project: Folder that the step's files are relative to.
            cache: The project's cache; a step that changes the tokenizer writes the new one there.
        """
        return self, tokenizer


class BrickStep(Step):
    """A step that can use bricks."""

    def names(self) -> list[str] | None:
        """Return the names of the bricks that the step uses, in order; None stands for all bricks of the recipe."""
        bricks = getattr(self, "bricks", None)
        return None if bricks is None else list(bricks)

    def entry(self, brick: str) -> BrickEntry:
        """Return the step's fields for one brick."""
        bricks = getattr(self, "bricks", None)
        if not isinstance(bricks, dict) or brick not in bricks:
            return self.entry_type()()
        entry = bricks[brick]
        return entry if isinstance(entry, BrickEntry) else self.entry_type()(weight=entry)

    @classmethod
    @cache  # asked for every tensor
    def entry_type(cls) -> type[BrickEntry]:
        """Return the class of a brick's fields, taken from the annotation of `bricks`."""
        stack: list[Any] = [cls.model_fields["bricks"].annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, BrickEntry):
                return kind
            stack.extend(get_args(kind))
        return BrickEntry


REGISTERED: dict[str, type[Step]] = {}
"""Tag -> class of every built-in method whose file has been imported; `recipe.methods` imports them all."""
OUTSIDE: dict[tuple[str, str], type[Step]] = {}
"""(Module, tag) -> class of every registered method outside this package; `recipe.plugins` decides which of them apply."""
S = TypeVar("S", bound=type[Step])


def register(cls: S) -> S:
    """Register a method under its verb and name, which its field names: `merge: Literal["ties"]`.

    Raises:
        TypeError: If the class has no such field.
        RuntimeError: If another class is registered under the name.
    """
    verb = cls.verb
    fields: dict[str, FieldInfo] = type.__getattribute__(cls, "model_fields")
    names = get_args(fields[verb].annotation) if verb in fields else ()
    if len(names) != 1 or not isinstance(names[0], str):
        raise TypeError(f'{cls.__name__}: expected a field {verb}: Literal["NAME"]')
    cls.name, cls.tag = names[0], f"{verb}:{names[0]}"
    if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
        registered = OUTSIDE.get((cls.__module__, cls.tag))
        if registered is not None and registered.__qualname__ != cls.__qualname__:
            raise RuntimeError(f"{registered.__name__} and {cls.__name__} are both {verb} method '{cls.name}'")
        OUTSIDE[cls.__module__, cls.tag] = cls
        return cls
    if cls.tag in REGISTERED and REGISTERED[cls.tag].__module__ != cls.__module__:
        raise RuntimeError(f"{cls.tag} is registered by {REGISTERED[cls.tag].__module__} and by {cls.__module__}")
    REGISTERED[cls.tag] = cls
    return cls
