"""Find the methods that steps name: the files of the folders `merge`, `edit` and `grow`, and a `methods.py` in a folder below them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache

from workbench.errors import WorkbenchError, nearest
from workbench.steps import Step
from workbench.steps.registry import REGISTERED, VERBS


@cache
def methods() -> dict[str, type[Step]]:
    """All methods, "verb:name" -> class, after importing every file of the three folders; bridges to other tools' methods come last."""
    for verb in VERBS:
        package = importlib.import_module(f"workbench.{verb}")
        for module in pkgutil.iter_modules(package.__path__, f"workbench.{verb}."):
            importlib.import_module(module.name)
            if module.ispkg and importlib.util.find_spec(f"{module.name}.methods"):
                importlib.import_module(f"{module.name}.methods")
    order = {verb: i for i, verb in enumerate(VERBS)}
    return dict(sorted(REGISTERED.items(), key=lambda item: (order[item[1].verb], "/" in item[0], item[0])))


def method(verb: str, name: str) -> type[Step]:
    """One method's class. Errors: unknown, with the nearest name."""
    known = {cls.name: cls for cls in methods().values() if cls.verb == verb}
    if name not in known:
        raise WorkbenchError(f"unknown {verb} method '{name}'. {nearest(name, known)}", "`workbench methods` lists all.", 2)
    return known[name]
