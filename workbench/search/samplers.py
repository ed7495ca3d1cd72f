"""Samplers of Optuna that draw candidates: a new sampler per candidate, so that a resumed search draws the same candidates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler

from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.recipe.fields import Range, Value
from workbench.search.greedy import check_greedy
from workbench.search.space import Dimension, Space, Values

FEW, MANY = 6, 20
"""`auto` selects a Gaussian process up to FEW dimensions and CMA-ES above MANY."""
STARTUP = 10
POPULATION = 12
"""Population of NSGA-II; a search has dozens of candidates, not thousands."""

EXCESS = "excess"
"""Attribute of a finished candidate: the largest loss on a guarded task beyond its tolerance; at most 0 if all are within it."""

optuna.logging.set_verbosity(optuna.logging.ERROR)  # hides the warning that greenlet would speed up sampling
warnings.filterwarnings(
    "ignore", message="PedAnovaImportanceEvaluator computes"
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
    constructors: dict[str, Any] = {
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
    sampler: BaseSampler = constructors[name]()
    return sampler


def grid(space: Space) -> dict[str, list[Any]]:
    """Return the grid's values by dimension."""
    return {d.name: _points(d) for d in space.dimensions}


def _points(dimension: Dimension) -> list[Any]:
    if not isinstance(dimension.domain, Range):
        return list(dimension.domain.choices)
    low, high, step = dimension.domain.low, dimension.domain.high, dimension.domain.step or 1
    return [dimension.round(low + i * step) for i in range(int((high - low) / step + 1e-9) + 1)]


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Draw values for the dimensions that exist, methods first.

    If the process was killed while it drew, the trial already has some values. They are drawn again and discarded, so that the sampler's
    random numbers for the remaining values are the same as in an uninterrupted search.
    """
    values: dict[str, Any] = {}
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
