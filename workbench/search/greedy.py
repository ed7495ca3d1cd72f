"""The greedy soup (Wortsman et al. 2022, Model soups, arXiv 2203.05482, recipe 1): add one brick after another, and keep it if the score does not fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import WorkbenchError
from workbench.search.space import Space, Values

_EXAMPLE = "STEP.bricks.NAME: {choices: [0, 1]}"


@dataclass(frozen=True)
class Tried:
    """A candidate that was started.

    Attributes:
        values: Value by dimension.
        score: Its score; None while it is being scored.
        failed: True if it has no score because it failed.
    """

    values: Values
    score: float | None = None
    failed: bool = False


def check_greedy(space: Space, objectives: int) -> None:
    """Check that every dimension says whether a brick is in the soup: two numbers, of which the first leaves it out.

    Raises:
        WorkbenchError: If a dimension is another one, or there are several objectives.
    """

    def error(message: str) -> WorkbenchError:
        return space.recipe.error(("search", "sampler"), f"greedy {message}", _EXAMPLE)

    if objectives > 1:
        raise error("compares one score, and the search has several objectives")
    if len(space.dimensions) < 2 or space.conditional:
        raise error("needs two or more dimensions that every method has, one for each brick")
    for dimension in space.dimensions:
        choices: Sequence[Any] = getattr(dimension.domain, "choices", ())
        if len(choices) != 2 or choices[0] != 0 or not all(type(value) in (int, float) for value in choices):
            raise error(
                f"needs the choices 0 (left out) and the weight in the soup for every dimension, and {dimension.name} has others"
            )


def next_soup(space: Space, tried: Sequence[Tried]) -> Values | None:
    """Return the next candidate; None if the soup is finished, or if it waits for a score.

    Every brick is scored alone first. Then the soup starts with the best one, and the others are added in the order of their scores; a
    brick stays if the score is at least that of the soup without it. A candidate that failed counts as the worst.
    """
    names = [dimension.name for dimension in space.dimensions]
    parts = {dimension.name: dimension.domain.choices for dimension in space.dimensions}

    def soup(members: Sequence[str]) -> Values:
        return {name: parts[name][name in members] for name in names}

    known = {tuple(one.values.get(name) for name in names): one for one in tried}

    def of(members: Sequence[str]) -> Tried | None:
        return known.get(tuple(soup(members).values()))

    alone = {name: of([name]) for name in names}
    if missing := [name for name, found in alone.items() if found is None]:
        return soup(missing[:1])
    scores = {name: _score(found) for name, found in alone.items() if found is not None}
    if None in scores.values():
        return None
    order = sorted(
        names, key=lambda name: scores[name] or 0.0, reverse=True
    )  # stable: the recipe's order decides between equal scores
    members, best = order[:1], scores[order[0]]
    for name in order[1:]:
        found = of([*members, name])
        if found is None:
            return soup([*members, name])
        score = _score(found)
        if score is None or best is None:
            return None
        if score >= best:
            members, best = [*members, name], score
    return None


def _score(tried: Tried) -> float | None:
    return float("-inf") if tried.failed else tried.score
