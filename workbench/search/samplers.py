"""Samplers that draw candidates: those of Optuna, and the greedy soup.

Each candidate has a sampler of its own, so that a resumed search draws the same candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.recipe.fields import Range, Value
from workbench.recipe.space import Dimension, Values
from workbench.search.space import Space

FEW, MANY = 6, 20
"""`auto` selects a Gaussian process up to FEW dimensions and CMA-ES above MANY."""
STARTUP = 10
POPULATION = 12
"""Population of NSGA-II; a search has dozens of candidates, not thousands."""

EXCESS = "excess"
"""Attribute of a finished candidate: the largest loss on a guarded task beyond its tolerance; at most 0 if all are within it."""

optuna.logging.set_verbosity(optuna.logging.ERROR)  # hides the warning that greenlet would speed up sampling
warnings.filterwarnings(
    "ignore", message="PedAnovaImportanceEvaluator computes|`constraints_func` has been deprecated"
)  # it warns that low targets are better: `study` passes negative scores
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def sampler_name(space: Space, objectives: int) -> str:
    """Return the name of the recipe's sampler, or the one that `auto` selects.

    Raises:
        WorkbenchError: If the recipe's sampler does not support the space or the number of objectives.
    """
    requested, dimensions = space.fields.sampler, space.dimensions
    numbers = all(isinstance(d.domain, Range) for d in dimensions)
    if requested == "cmaes" and (objectives > 1 or not numbers or space.conditional):
        raise _error(
            space,
            "cmaes supports only one objective and ranges of numbers that every method has",
            "sampler: auto",
        )
    if requested == "gp" and space.conditional:
        raise _error(space, "gp needs dimensions that every method has, but some belong to one method only", "sampler: tpe")
    stepless = [d.name for d in dimensions if isinstance(d.domain, Range) and not d.whole and d.domain.step is None]
    if requested == "grid" and (stepless or space.conditional):
        problem = f"{stepless[0]} has no step" if stepless else "some dimensions belong to one method only"
        raise _error(
            space,
            f"grid needs a `step` for every range, and dimensions that every method has: {problem}",
            "STEP.FIELD: {low: 0, high: 1, step: 0.25}",
        )
    if requested == "greedy":
        check_greedy(space, objectives)
    if requested != "auto":
        return requested
    if space.conditional:
        return "tpe"
    if objectives > 1:
        return "gp" if objectives <= 3 and len(dimensions) <= FEW else "nsga2"
    if len(dimensions) <= FEW:
        return "gp"
    return "cmaes" if len(dimensions) > MANY and numbers else "tpe"


def make_sampler(name: str, space: Space, seed: int, number: int, *, guarded: bool = False) -> BaseSampler:
    """Return a sampler for one candidate, whose draws depend on the seed, the candidate's number and the candidates before it.

    If `guarded`, those samplers that support it avoid candidates that lose too much on a guarded task.
    """
    guard = (lambda t: [float(t.user_attrs.get(EXCESS, 0.0))]) if guarded else None
    candidate_seed = int(json_digest(["sampler", seed, number])[:8], 16)
    start = space.written()
    constructors: dict[str, Callable[[], BaseSampler]] = {
        "random": lambda: RandomSampler(seed=candidate_seed),
        "tpe": lambda: TPESampler(
            seed=candidate_seed,
            n_startup_trials=STARTUP,
            multivariate=True,
            group=space.conditional,
            constant_liar=True,
            constraints_func=guard,
        ),
        "gp": lambda: GPSampler(seed=candidate_seed, n_startup_trials=STARTUP, constraints_func=guard),
        # The study keeps its state, including random numbers, so that all candidates share one seed.
        "cmaes": lambda: CmaEsSampler(seed=seed, x0=dict(start) if start else None),
        "nsga2": lambda: NSGAIISampler(seed=candidate_seed, population_size=POPULATION, constraints_func=guard),
        "grid": lambda: GridSampler(grid(space), seed=seed),
        "greedy": lambda: RandomSampler(seed=candidate_seed),  # every candidate is queued with its values
    }
    return constructors[name]()


def grid(space: Space) -> dict[str, list[Any]]:
    """Return the grid's values by dimension."""
    return {d.name: _points(d) for d in space.dimensions}


def _points(dimension: Dimension) -> list[Any]:
    if not isinstance(dimension.domain, Range):
        return list(dimension.domain.choices)
    low, high, step = dimension.domain.low, dimension.domain.high, dimension.domain.step or 1
    return [dimension.round(low + i * step) for i in range(int((high - low) / step + 1e-9) + 1)]


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """Draw values for the dimensions that exist, methods first.

    If the process was killed while it drew, the trial already has some values. They are drawn again and discarded, so that the sampler's
    random numbers for the remaining values are the same as in an uninterrupted search.
    """
    values: dict[str, Value] = {}
    drawn = trial._get_latest_trial()
    fixed = drawn.system_attrs.get("fixed_params", {})
    for name, distribution in drawn.distributions.items():
        if name not in fixed and not distribution.single() and name not in trial.relative_params:
            trial.study.sampler.sample_independent(trial.study, drawn, name, distribution)
    for dimension in space.dimensions:
        if dimension in space.active(values):
            values[dimension.name] = _drawn(trial, dimension)
    return values


def _drawn(trial: optuna.Trial, dimension: Dimension) -> Value:
    name, domain = dimension.name, dimension.domain
    if not isinstance(domain, Range):
        choice: Value = trial.suggest_categorical(name, domain.choices)
        return choice
    if dimension.whole:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return dimension.round(trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step))


def starts(space: Space, lambdas: Sequence[float]) -> list[Values]:
    """Return the first candidates: the recipe as written, with each other method of the space, and with other lambdas."""
    first = [dict(values) for method in (None, *space.other_methods()) if (values := space.written(method))]
    written = space.written() or {}
    for dimension in space.active(written) if written else ():
        if dimension.path[-1] == "lambda" and isinstance(dimension.domain, Range):
            first += [{**written, dimension.name: dimension.round(value)} for value in lambdas if dimension.holds(value)]
    return [values for i, values in enumerate(first) if values not in first[:i]]


def _error(space: Space, message: str, hint: str) -> WorkbenchError:
    return space.recipe.error(("search", "sampler"), message, hint)


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
