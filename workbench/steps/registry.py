"""The registry of methods."""

from __future__ import annotations

from typing import TypeVar, get_args

from pydantic.fields import FieldInfo

from workbench.steps.step import VERBS, Step

REGISTERED: dict[str, type[Step]] = {}
"""Tag -> class of every built-in method whose file has been imported; `recipe.methods` imports them all."""
OUTSIDE: dict[tuple[str, str], type[Step]] = {}
"""(Module, tag) -> class of every registered method outside this package; `recipe.plugins` decides which of them apply."""
S = TypeVar("S", bound=type[Step])


def verbs() -> tuple[str, ...]:
    """Return the verbs of all kinds of step, in the order of the lists of methods."""
    return tuple(sorted(VERBS, key=lambda verb: (VERBS[verb], verb)))


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
