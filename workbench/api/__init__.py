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
    "answers": ("ItemsBeside",),
    "loading": ("LoadedRecipe", "load", "load_recipe", "load_tokenizer"),
    "neurons": ("Neurons",),
    "results": ("ComparedScores",),
    "scoring": ("compare", "evaluate", "items"),
}
_OF_PARTS = {"FoundValues": "search.python", "search": "search.python"}
"""Name that a part gives -> its module."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because commands import parts of this package."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"workbench.api.{home}"), name)
    if module := _OF_PARTS.get(name):
        from workbench.ground.parts import imported, missing, parts

        part = module.partition(".")[0]
        if part not in parts():
            raise missing(part, f"workbench.api.{name}")
        return imported(f"{module}.{name}")
    raise AttributeError(f"module 'workbench.api' has no attribute {name!r}")
