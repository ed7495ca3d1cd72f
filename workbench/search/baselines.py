"""Controls of a search, which need no search.

They are the base, each brick, their average, the recipe as written and with each method of the space, task arithmetic with a few lambdas, and
a mean with the weights of LM-Cocktail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from workbench.evaluate.lineup import LineupEntry, lineup
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.search.objective import Answers, Objective
from workbench.search.space import Space

LAMBDAS = (0.3, 0.6, 1.0)
"""Lambdas of the task arithmetic controls, and of the first candidates if lambda is a dimension."""
TEMPERATURE = 5.0
"""Temperature of LM-Cocktail (Xiao et al. 2023, arXiv 2311.13534)."""
COCKTAIL = "cocktail"


def baselines(space: Space) -> list[LineupEntry]:
    """Return the controls of a search, including the recipe as written and with each other method of the space."""
    recipe = space.recipe
    plain = recipe.without_search()
    entries = lineup([plain], sequences=False)
    bricks = _bricks(plain)
    for values in space.other_methods():
        (method,) = values.values()
        other = space.recipe_of(values, f"{recipe.name}-{method}")
        entries.append(LineupEntry(other.name, "configuration", resolve(other)))
    for lam in LAMBDAS if len(bricks) > 1 else ():
        step = {"merge": "task_arithmetic", "bricks": dict.fromkeys(bricks, 1.0), "lambda": lam}
        name = f"task-arithmetic-{lam:g}"
        entries.append(LineupEntry(name, "average", resolve(recipe.derive(name, [step], bricks))))
    unique: dict[str, LineupEntry] = {}
    for entry in entries:
        unique.setdefault(entry.resolved.key, entry)
    return list(unique.values())


def cocktail(recipe: Recipe, answers: Mapping[str, Answers], objectives: Sequence[Objective], metric: str) -> LineupEntry | None:
    """Return the mean of the bricks with weights softmax(log p / T), where log p is each brick's log-probability of right answers.

    Args:
        recipe: Recipe of the search.
        answers: Answers of the controls by name.
        objectives: Objectives of the search.
        metric: Name of the log-probability of right answers, which the first items have.

    Returns:
        The control, or None if a brick was not scored alone or no task has this log-probability.
    """
    bricks = _bricks(recipe)
    keys = list(dict.fromkeys(term.key for objective in objectives for term in objective.terms))
    if len(bricks) < 2 or not all(name in answers for name in bricks):
        return None
    log_probabilities = [value for name in bricks if (value := answers[name].mean(keys, metric)) is not None]
    if len(log_probabilities) < len(bricks):
        return None
    shares = [math.exp((value - max(log_probabilities)) / TEMPERATURE) for value in log_probabilities]
    weights = {name: round(share / sum(shares), 4) for name, share in zip(bricks, shares, strict=True)}
    step = {"merge": "linear", "bricks": weights}
    return LineupEntry(COCKTAIL, "average", resolve(recipe.derive(COCKTAIL, [step], bricks)))


def _bricks(recipe: Recipe) -> list[str]:
    """Return the bricks of the first merge step; none if there is no merge step."""
    step = next((step for step in recipe.steps if step.merges), None)
    return recipe.used_bricks(step) if step else []
