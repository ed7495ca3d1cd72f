"""torch and numpy, which are imported when they are first used.

Importing torch takes longer than most commands run, and numpy a sixth of `plan`. Modules that describe models and methods are imported by
commands that compute nothing, so they write `from workbench.ground.lazy import np, torch` instead of `import torch`, and import names that only
annotations need, such as `Tensor`, for type checkers only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

__all__ = ["no_grad", "np", "torch"]

P = ParamSpec("P")
R = TypeVar("R")


class _OnFirstUse(ModuleType):
    """A stand-in that imports the module of its name when an attribute is read.

    `importlib.util.LazyLoader` is not used: before Python 3.12 it fails if two threads use the module first at the same time, a
    second import statement loads the module at once, and submodules that are imported first are executed twice. This class leaves
    `sys.modules` alone. The import system locks the module while it loads, so threads wait for each other.
    """

    def __getattr__(self, name: str) -> Any:
        module = import_module(self.__name__)
        for user, importer in list(sys.modules.items()):
            # The modules of this package then refer to the module itself, at no further cost.
            for alias in ("np", "torch") if user.startswith("workbench.") else ():
                if vars(importer).get(alias) is self:
                    setattr(importer, alias, module)
        return getattr(module, name)


if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np = sys.modules.get("numpy") or _OnFirstUse("numpy")
    torch = sys.modules.get("torch") or _OnFirstUse("torch")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function or a generator like `torch.no_grad()`, which is called only when the function is."""

    @wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        return torch.no_grad()(function)(*args, **kwargs)

    return without_gradients
