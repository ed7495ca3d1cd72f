"""What every step of a recipe is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import Field

from workbench.steps.fields import NAME, BrickEntry, Strict


@dataclass(frozen=True)
class Plugin:
    """Where a method outside this package comes from.

    Attributes:
        source: Distribution and version, or the path of a method file of a project.
        digest: Digest of its code; part of every cache key of its steps.
    """

    source: str
    digest: str


class Step(Strict):
    """One step of a recipe: `{merge|edit|grow: METHOD}` and the method's fields."""

    id: str | None = Field(None, pattern=NAME)
    """Name of the step, for `--set ID.FIELD=VALUE` and the run's record; default: verb and method."""

    verb: ClassVar[str]
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
    plugin: ClassVar[Plugin | None] = None
    """Origin of a method outside this package; None for built-in methods."""

    @classmethod
    def code_key(cls) -> int | list[Any]:
        """Return the part of cache keys that stands for the method's code: its version, and the digest of a plug-in."""
        return [cls.version, cls.plugin.digest] if cls.plugin else cls.version


class BrickStep(Step):
    """A step that may take bricks."""

    def names(self) -> list[str] | None:
        """Bricks that the step takes, in order; None for all of the recipe."""
        bricks = getattr(self, "bricks", None)
        return None if bricks is None else list(bricks)

    def entry(self, brick: str) -> BrickEntry:
        """The step's fields for one brick."""
        bricks = getattr(self, "bricks", None)
        if not isinstance(bricks, dict) or brick not in bricks:
            return self.entry_type()()
        given = bricks[brick]
        return given if isinstance(given, BrickEntry) else self.entry_type()(weight=given)

    @classmethod
    def entry_type(cls) -> type[BrickEntry]:
        """The class of a brick's fields, as the annotation of `bricks` names it."""
        stack: list[Any] = [cls.model_fields["bricks"].annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, BrickEntry):
                return kind
            stack.extend(get_args(kind))
        return BrickEntry
