"""What needs no search: the base, each brick, their average, the recipe as it stands and with each method of the space, task arithmetic at a
few lambdas, a mean weighted as LM-Cocktail weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.search.objective import Answers, Objective
from workbench.search.space import Space

LAMBDAS = (0.3, 0.6, 1.0)
"""Of task arithmetic, and of the candidates that a search with lambda as a dimension tries first."""
TEMPERATURE = 5.0
"""LM-Cocktail's (Xiao et al. 2023, arXiv 2311.13534)."""
COCKTAIL = "cocktail"


def baselines(space: Space) -> list[LineupEntry]:
    """The controls of a search, the recipe as it is written among them, and the same with each method that the space has."""
    recipe = space.recipe
    plain = recipe.without_search()
    found = lineup([plain], sequences=False)
    bricks = _bricks(plain)
    for values in space.other_methods():
        (method,) = values.values()
        other = space.recipe_of(values, f"{recipe.name}-{method}")
        found.append(LineupEntry(other.name, "configuration", resolve(other)))
    for lam in LAMBDAS if len(bricks) > 1 else ():
        step = {"merge": "task_arithmetic", "bricks": dict.fromkeys(bricks, 1.0), "lambda": lam}
        name = f"task-arithmetic-{lam:g}"
        found.append(LineupEntry(name, "average", resolve(recipe.derive(name, [step], bricks))))
    keys: set[str] = set()
    return [e for e in found if e.resolved.key not in keys and not keys.add(e.resolved.key)]  # type: ignore[func-returns-value]


def cocktail(recipe: Recipe, seen: Mapping[str, Answers], objectives: Sequence[Objective], metric: str) -> LineupEntry | None:
    """The mean of the bricks, each weighted by the log-probability that it gives to the right answers of the first items:
    w = softmax(log p / T). None where a brick was not scored alone, or no task has right answers to look at."""
    bricks = _bricks(recipe)
    keys = list(dict.fromkeys(term.key for objective in objectives for term in objective.terms))
    if len(bricks) < 2 or not all(name in seen for name in bricks):
        return None
    found = [seen[name].mean(keys, metric) for name in bricks]
    gold = [value for value in found if value is not None]
    if len(gold) < len(bricks):
        return None
    shares = [math.exp((value - max(gold)) / TEMPERATURE) for value in gold]
    weights = {name: round(share / sum(shares), 4) for name, share in zip(bricks, shares, strict=True)}
    step = {"merge": "linear", "bricks": weights}
    return LineupEntry(COCKTAIL, "average", resolve(recipe.derive(COCKTAIL, [step], bricks)))


def _bricks(recipe: Recipe) -> list[str]:
    """Of the first merge step; none where nothing is merged."""
    step = next((step for step in recipe.steps if step.merges), None)
    return recipe.used_bricks(step) if step else []
