"""The list of methods that implement steps."""

from __future__ import annotations

from typing import TypeVar, get_args

from pydantic.fields import FieldInfo

from workbench.steps.step import VERBS, Step

REGISTERED: dict[str, type[Step]] = {}
"""Tag -> class of every method whose file has been imported; `recipe.methods` imports them all."""
S = TypeVar("S", bound=type[Step])


def verbs() -> tuple[str, ...]:
    """Return the verbs of all kinds of step, in the order in which lists of methods show them."""
    return tuple(sorted(VERBS, key=lambda verb: (VERBS[verb], verb)))


def register(cls: S) -> S:
    """Add a method under its verb and name, read from its field `merge: Literal["ties"]`. Twice the same is an error."""
    verb = cls.verb
    fields: dict[str, FieldInfo] = type.__getattribute__(cls, "model_fields")
    (name,) = get_args(fields[verb].annotation)
    cls.name, cls.tag = name, f"{verb}:{name}"
    if cls.tag in REGISTERED and REGISTERED[cls.tag].__module__ != cls.__module__:
        raise RuntimeError(f"{cls.tag} is registered by {REGISTERED[cls.tag].__module__} and by {cls.__module__}")
    REGISTERED[cls.tag] = cls
    return cls
