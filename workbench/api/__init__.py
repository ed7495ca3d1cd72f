"""The Python API: run recipes, score configurations, compare and search, with the code that the commands run.

Example:
    from workbench import api

    recipe = api.load_recipe("recipes/starter-ties.yaml")
    print(recipe.plan())
    recipe.run()
    model = recipe.model()

    scored = api.evaluate(["starter-ties", "starter-average"], suite="smoke")
    print(scored.recommendation)
    scored.to_pandas("scores")
    scored.save("reports/mine.html")

The last expression of a notebook's cell shows a result as the page of the report. The names stand here and not in `workbench`, because
`workbench.evaluate`, `workbench.compare` and `workbench.search` are packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.api.answers import ItemsBeside
    from workbench.api.loading import LoadedRecipe, load, load_recipe, load_tokenizer
    from workbench.api.neurons import Neurons
    from workbench.api.results import ComparedScores
    from workbench.api.scoring import compare, evaluate, items

__all__ = [
    "ComparedScores",
    "FoundValues",
    "ItemsBeside",
    "LoadedRecipe",
    "Neurons",
    "compare",
    "evaluate",
    "items",
    "load",
    "load_recipe",
    "load_tokenizer",
    "search",
]
_HOMES = {
    "workbench.api.answers": ("ItemsBeside",),
    "workbench.api.loading": ("LoadedRecipe", "load", "load_recipe", "load_tokenizer"),
    "workbench.api.neurons": ("Neurons",),
    "workbench.api.results": ("ComparedScores",),
    "workbench.api.scoring": ("compare", "evaluate", "items"),
    "workbench.search.python": ("FoundValues", "search"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because commands import parts of this package, and an installation can lack the search."""
    for home, names in _HOMES.items():
        if name in names:
            try:
                return getattr(importlib.import_module(home), name)
            except ModuleNotFoundError as error:
                if error.name is None or not home.startswith(error.name):
                    raise
                raise ImportError(f"workbench.api.{name} needs {error.name}, which this installation lacks") from None
    raise AttributeError(f"module 'workbench.api' has no attribute {name!r}")
