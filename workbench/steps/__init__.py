"""The kinds of step, one signature each, and the registry of the methods that implement them.

    merge   (base block, one delta per brick) -> delta      streams block by block
    edit    (live model, tokenizer, facts)    -> factors    the result is a brick
            (live model, tokenizer, facts)    -> memory     ends a recipe: the memory acts on the live model
    grow    (model)                           -> new names  streams tensor by tensor
    fuse    (losses of models on texts)       -> shares     the model is trained on the models' weighted distributions
    route   (live base, prompts per brick)    -> router     ends a recipe: bricks stay apart, and the router chooses

A method is one file in `workbench/merge`, `workbench/edit`, `workbench/grow`, `workbench/fuse` or `workbench/route` that decorates one class
with `@register`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.steps.edit import Cost, Edit, EditMethod, Kept, Memory, MemoryMethod, MethodContext, Remembered
    from workbench.steps.grow import NEW, Axis, GrowContext, GrowMethod, Grown, Growth, Learns, Preserves, Sources
    from workbench.steps.merge import (
        Block,
        Combination,
        Group,
        Laws,
        Measured,
        Memo,
        MergeContext,
        MergeMethod,
        OverlapWeighted,
        Prepared,
    )
    from workbench.steps.route import (
        CalibratedRoute,
        Decisions,
        Prompts,
        RouteContext,
        RoutedBrick,
        RouteMethod,
        Router,
    )
    from workbench.steps.step import VERBS, BrickStep, KeyContext, Problem, Step, register
    from workbench.steps.training import FuseMethod, NewTraining, Recovery, TrainMethod

__all__ = [
    "NEW",
    "VERBS",
    "Axis",
    "Block",
    "BrickStep",
    "CalibratedRoute",
    "Combination",
    "Cost",
    "Decisions",
    "Edit",
    "EditMethod",
    "FuseMethod",
    "Group",
    "GrowContext",
    "GrowMethod",
    "Grown",
    "Growth",
    "Kept",
    "KeyContext",
    "Laws",
    "Learns",
    "Measured",
    "Memo",
    "Memory",
    "MemoryMethod",
    "MergeContext",
    "MergeMethod",
    "MethodContext",
    "NewTraining",
    "OverlapWeighted",
    "Prepared",
    "Preserves",
    "Problem",
    "Prompts",
    "Recovery",
    "Remembered",
    "RouteContext",
    "RouteMethod",
    "RoutedBrick",
    "Router",
    "Sources",
    "Step",
    "TrainMethod",
    "register",
]
MODULES = ("step", "merge", "edit", "route", "training", "grow")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` on first use, because a recipe rarely needs all kinds; of `MODULES`, only those up to the name's."""
    if name in __all__:
        for module in MODULES:
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
