"""Discovery of methods: files in the folders `merge`, `edit`, `grow`, `fuse` and `route`, and `methods.py` in their subfolders."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache

from workbench import steps
from workbench.steps import Step
from workbench.steps.step import REGISTERED, verbs

@cache
def methods() -> dict[str, type[Step]]:
    """Return all methods as "verb:name" -> class. Within a verb, methods of other tools such as `mergekit/...` come last.

    Imports every file of `workbench/steps`, which declare the kinds of step, and every method file in the folders named after
    their verbs.
    """
    _import_kinds()
    for verb in verbs():
        package = importlib.import_module(f"workbench.{verb}")
        for module in pkgutil.iter_modules(package.__path__, f"workbench.{verb}."):
            importlib.import_module(module.name)
            if module.ispkg and importlib.util.find_spec(f"{module.name}.methods"):
                importlib.import_module(f"{module.name}.methods")
    order = {verb: i for i, verb in enumerate(verbs())}
    return dict(sorted(REGISTERED.items(), key=lambda item: (order[item[1].verb], "/" in item[0], item[0])))


def built_in(verb: str, name: str) -> type[Step] | None:
    """Return a built-in method, or None if there is none.

    Imports only the method's file if it is named after the method, because importing all of them takes longer than checking a
    recipe.

    Args:
        verb: The kind of step, such as "merge".
        name: Name of the method in recipes.
    """
    _import_kinds()
    module = f"workbench.{verb}.{name}"
    if verb in verbs() and name.isidentifier() and importlib.util.find_spec(module):
        importlib.import_module(module)
    tag = f"{verb}:{name}"
    return REGISTERED.get(tag) or methods().get(tag)


def _import_kinds() -> None:
    """Import every file of `workbench/steps`, which declare the kinds of step."""
    for module in pkgutil.iter_modules(steps.__path__, "workbench.steps."):
        importlib.import_module(module.name)
