"""The registry of methods."""

from __future__ import annotations

from typing import TypeVar, get_args

from pydantic.fields import FieldInfo

from workbench.steps.step import VERBS, Step

REGISTERED: dict[str, type[Step]] = {}
"""Tag -> class of every method whose file has been imported. `recipe.methods` imports all of them."""
S = TypeVar("S", bound=type[Step])


def verbs() -> tuple[str, ...]:
    """Return the verbs of all kinds of step, in the order of the lists of methods."""
    return tuple(sorted(VERBS, key=lambda verb: (VERBS[verb], verb)))


def register(cls: S) -> S:
    """Register a method under its verb and name, which come from its field such as `merge: Literal["ties"]`.

    Raises:
        RuntimeError: If another module has registered the same verb and name.
    """
    verb = cls.verb
    fields: dict[str, FieldInfo] = type.__getattribute__(cls, "model_fields")
    (name,) = get_args(fields[verb].annotation)
    cls.name, cls.tag = name, f"{verb}:{name}"
    if cls.tag in REGISTERED and REGISTERED[cls.tag].__module__ != cls.__module__:
        raise RuntimeError(f"{cls.tag} is registered by {REGISTERED[cls.tag].__module__} and by {cls.__module__}")
    REGISTERED[cls.tag] = cls
    return cls
