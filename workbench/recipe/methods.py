"""Find the methods that steps name: the files of the folders `merge`, `edit` and `grow`, and a `methods.py` in a folder below them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache
from typing import TypeVar

from workbench import steps
from workbench.errors import WorkbenchError, nearest
from workbench.steps import Step
from workbench.steps.registry import REGISTERED, verbs

K = TypeVar("K", bound=Step)


@cache
def methods() -> dict[str, type[Step]]:
    """Return all methods, "verb:name" -> class; methods of other tools come last within their verb.

    Imports every file of `workbench/steps`, where kinds of step are declared, and every method file in the folders that their verbs name.
    """
    for module in pkgutil.iter_modules(steps.__path__, "workbench.steps."):
        importlib.import_module(module.name)
    for verb in verbs():
        package = importlib.import_module(f"workbench.{verb}")
        for module in pkgutil.iter_modules(package.__path__, f"workbench.{verb}."):
            importlib.import_module(module.name)
            if module.ispkg and importlib.util.find_spec(f"{module.name}.methods"):
                importlib.import_module(f"{module.name}.methods")
    order = {verb: i for i, verb in enumerate(verbs())}
    return dict(sorted(REGISTERED.items(), key=lambda item: (order[item[1].verb], "/" in item[0], item[0])))


def method(kind: type[K], name: str) -> type[K]:
    """Return the class of a method.

    Args:
        kind: The kind of step that it has to be: `MergeMethod`, `EditMethod`, ...
        name: Its name in recipes.

    Raises:
        WorkbenchError: If there is no such method; the message has the nearest name.
    """
    known = {cls.name: cls for cls in methods().values() if issubclass(cls, kind)}
    if name not in known:
        raise WorkbenchError(f"unknown {kind.verb} method '{name}'. {nearest(name, known)}", "`workbench methods` lists all.", 2)
    return known[name]
