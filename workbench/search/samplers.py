"""Which of Optuna's samplers draws candidates, and how: one for each candidate, so that a search that was interrupted goes on as it would have."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler

from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.recipe.search_fields import Range, Value
from workbench.search.space import Dimension, Space, Values

FEW, MANY = 6, 20
"""Dimensions up to which a Gaussian process draws, and beyond which CMA-ES does."""
STARTUP = 10
POPULATION = 12
"""Of NSGA-II: a search has some dozens of candidates, not thousands."""

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a warning says that greenlet would speed a search for the next point up
warnings.filterwarnings(
    "ignore", message="PedAnovaImportanceEvaluator computes"
)  # for low targets: `study` gives it negative scores
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def sampler_name(space: Space, objectives: int) -> str:
    """The sampler that `auto` takes. Errors: one that does not do what is asked of it."""
    asked, dimensions = space.fields.sampler, space.dimensions
    numbers = all(isinstance(d.domain, Range) for d in dimensions)
    if asked == "cmaes" and (objectives > 1 or not numbers or space.conditional):
        raise _error(space, "cmaes draws numbers for one objective", "sampler: auto")
    if asked == "gp" and space.conditional:
        raise _error(space, "gp needs every dimension with every method, and some belong to one alone", "sampler: tpe")
    endless = [d.name for d in dimensions if isinstance(d.domain, Range) and not d.whole and d.domain.step is None]
    if asked == "grid" and (endless or space.conditional):
        found = f"{endless[0]} has none" if endless else "some belong to one alone"
        raise _error(space, f"grid needs a `step` for every range, and every dimension with every method: {found}",
                     "STEP.FIELD: {low: 0, high: 1, step: 0.25}")  # fmt: skip
    if asked != "auto":
        return asked
    if space.conditional:
        return "tpe"
    if objectives > 1:
        return "gp" if objectives <= 3 and len(dimensions) <= FEW else "nsga2"
    if len(dimensions) <= FEW:
        return "gp"
    return "cmaes" if len(dimensions) > MANY and numbers else "tpe"


def make_sampler(name: str, space: Space, seed: int, number: int) -> BaseSampler:
    """A sampler for one candidate: what it draws depends on the seed, the candidate's number and the candidates before it."""
    own = int(json_digest(["sampler", seed, number])[:8], 16)
    start = space.written()
    made: dict[str, Any] = {
        "random": lambda: RandomSampler(seed=own),
        "tpe": lambda: TPESampler(
            seed=own, n_startup_trials=STARTUP, multivariate=True, group=space.conditional, constant_liar=True
        ),
        "gp": lambda: GPSampler(seed=own, n_startup_trials=STARTUP),
        # Its own state, random numbers included, is kept in the study: one seed for all.
        "cmaes": lambda: CmaEsSampler(seed=seed, x0=dict(start) if start else None),
        "nsga2": lambda: NSGAIISampler(seed=own, population_size=POPULATION),
        "grid": lambda: GridSampler(grid(space), seed=seed),
    }
    found: BaseSampler = made[name]()
    return found


def grid(space: Space) -> dict[str, list[Any]]:
    """Dimension -> its values."""
    return {d.name: _points(d) for d in space.dimensions}


def _points(dimension: Dimension) -> list[Any]:
    if not isinstance(dimension.domain, Range):
        return list(dimension.domain.choices)
    low, high, step = dimension.domain.low, dimension.domain.high, dimension.domain.step or 1
    return [dimension.round(low + i * step) for i in range(int((high - low) / step + 1e-9) + 1)]


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Draw values for the dimensions that exist, methods first.

    A trial whose process was killed while it drew has some values already. They are drawn again and thrown away, so that the
    sampler's random numbers for the remaining values are those of an uninterrupted search.
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
        found: Value = trial.suggest_categorical(name, domain.choices)
        return found
    if dimension.whole:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return dimension.round(trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step))


def starts(space: Space, lambdas: Sequence[float]) -> list[Values]:
    """Candidates that are tried first: the recipe as it is written, the same with each other method of the space, and with other lambdas."""
    found = [dict(values) for method in (None, *space.other_methods()) if (values := space.written(method))]
    written = space.written() or {}
    for dimension in space.active(written) if written else ():
        if dimension.path[-1] == "lambda" and isinstance(dimension.domain, Range):
            found += [{**written, dimension.name: dimension.round(value)} for value in lambdas if dimension.holds(value)]
    return [values for i, values in enumerate(found) if values not in found[:i]]


def _error(space: Space, message: str, hint: str) -> WorkbenchError:
    return space.recipe.error(("search", "sampler"), message, hint)
