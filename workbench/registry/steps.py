"""What every step is, and the list of methods that implement steps."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

from workbench.errors import WorkbenchError
from workbench.fields import NAME, BrickEntry, Strict

VERBS = ("merge", "edit", "grow")


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


_METHODS: dict[str, type[Step]] = {}
S = TypeVar("S", bound=type[Step])


def register(cls: S) -> S:
    """Add a method under its verb and name, read from its field `merge: Literal["ties"]`. Twice the same is an error."""
    verb = cls.verb
    fields: dict[str, FieldInfo] = type.__getattribute__(cls, "model_fields")
    (name,) = get_args(fields[verb].annotation)
    cls.name, cls.tag = name, f"{verb}:{name}"
    if cls.tag in _METHODS and _METHODS[cls.tag].__module__ != cls.__module__:
        raise RuntimeError(f"{cls.tag} is registered by {_METHODS[cls.tag].__module__} and by {cls.__module__}")
    _METHODS[cls.tag] = cls
    return cls


@cache
def methods() -> dict[str, type[Step]]:
    """All methods, "verb:name" -> class, after importing every file of the three folders; bridges to other tools' methods come last."""
    for verb in VERBS:
        package = importlib.import_module(f"workbench.{verb}")
        for module in pkgutil.iter_modules(package.__path__, f"workbench.{verb}."):
            importlib.import_module(module.name)
    order = {verb: i for i, verb in enumerate(VERBS)}
    return dict(sorted(_METHODS.items(), key=lambda item: (order[item[1].verb], "/" in item[0], item[0])))


def method(verb: str, name: str) -> type[Step]:
    """One method's class. Errors: unknown, with the nearest name."""
    from workbench.errors import nearest

    known = {cls.name: cls for cls in methods().values() if cls.verb == verb}
    if name not in known:
        raise WorkbenchError(f"unknown {verb} method '{name}'. {nearest(name, known)}", "`workbench methods` lists all.", 2)
    return known[name]
