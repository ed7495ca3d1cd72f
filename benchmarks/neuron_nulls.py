"""Neurons that are planted, and models without any: what the test of `analyze functions` finds, beside the rule before it.

    python benchmarks/neuron_nulls.py
    python benchmarks/neuron_nulls.py --models 50 --planted 4

A model is made of scores: every neuron has a level of its own, a deviation on each task that it partly shares with other neurons (wording), and noise on each
text; scores are exponentials, as those of real neurons are skewed. A planted neuron is higher on all tasks of one function by 1 to 4 standard deviations of its
deviations on tasks. Results go to benchmarks/results/neuron-nulls.json: the share of models without planted neurons in which any neuron is found, and of
the planted neurons those that are found.

The rule before took the best average precision of a layer on 20 labelings shuffled over tasks, with all layers and functions in one
distribution, and counted the neurons of the whole model that exceed its 99 % quantile on the tasks that choose sets, or on both splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from record import parser_of, write_results
from scipy.stats import binomtest

from workbench.neurons.statistics import Ranked, task_test

Bools: TypeAlias = NDArray[np.bool_]
LAYERS, UNITS, DRAWS_BEFORE = 30, 24, 20
NEURONS = LAYERS * UNITS
PLANTED, EFFECTS = 64, (1, 2, 3, 4)
SPREAD, NOISE = 0.5, 0.7
"""Standard deviation of a neuron's deviations on tasks, and of the noise on texts, both of logarithms."""


@dataclass(frozen=True)
class World:
    """Tasks of functions and their texts.

    Attributes:
        name: Name of the row.
        tasks: Number of tasks of each function.
        texts: Smallest and largest number of texts of a task.
        spread: Factor of the deviations on the tasks of the first two functions.
        degrees: Degrees of freedom of the deviations.
    """

    name: str
    tasks: tuple[int, ...]
    texts: tuple[int, int] = (10, 10)
    spread: float = 1.0
    degrees: int = 5


WORLDS = (
    World("7 functions of 4 tasks", (4,) * 7),
    World("7 functions of 6 tasks", (6,) * 7),
    World("2 to 10 tasks, 3 to 30 texts", (2, 3, 4, 5, 6, 8, 10), (3, 30)),
    World("6 tasks, rare large deviations", (6,) * 7, degrees=3),
    World("6 tasks, two functions vary twice as much", (6,) * 7, spread=2.0),
)


@dataclass(frozen=True)
class Made:
    """Scores of a model: [texts, neurons], the task of each text, the function of each task, and the planted pairs [functions, neurons]."""

    scores: NDArray[np.float32]
    task: NDArray[np.intp]
    owners: NDArray[np.intp]
    planted: Bools
    effects: NDArray[np.intp]


def made(world: World, seed: int, planted: int = 0) -> Made:
    """Return a model's scores."""
    rng = np.random.default_rng([seed, WORLDS.index(world), planted])
    owners = np.repeat(np.arange(len(world.tasks)), world.tasks)
    own, shared = (rng.standard_t(world.degrees, (len(owners), n)) for n in (NEURONS, 20))
    deviations = SPREAD * math.sqrt((1 - 2 / world.degrees) / 2) * (own + shared @ rng.normal(size=(20, NEURONS)) / math.sqrt(20))
    deviations[owners < 2] *= world.spread
    truth = np.zeros((len(world.tasks), NEURONS), bool)
    effects = np.zeros(NEURONS, np.intp)
    for number, neuron in enumerate(rng.choice(NEURONS, planted, replace=False)):
        function = number % len(world.tasks)
        truth[function, neuron], effects[neuron] = True, EFFECTS[number % len(EFFECTS)]
        deviations[owners == function, neuron] += effects[neuron] * SPREAD
    task = np.repeat(np.arange(len(owners)), rng.integers(world.texts[0], world.texts[1] + 1, len(owners)))
    logs = rng.normal(size=NEURONS) + deviations[task] + NOISE * rng.normal(size=(len(task), NEURONS))
    return Made(np.exp(logs.clip(-60, 60), dtype=np.float32), task, owners, truth, effects)


def found_now(model: Made) -> Bools:
    """Return what the test finds [functions, neurons]."""
    counts = np.bincount(model.task)[:, None]
    starts = np.searchsorted(model.task, np.arange(len(counts)))
    means = np.add.reduceat(model.scores, starts) / counts
    return np.concatenate(task_test(np.split(means, LAYERS, 1), model.owners).found, 1)


def found_before(model: Made) -> tuple[Bools, Bools]:
    """Return what the rule before finds on one split, and on both."""
    passed = []
    for split in (0, 1):  # every second task of a function
        place = np.concatenate([np.arange(n) % 2 for n in np.bincount(model.owners)])
        texts = place[model.task] == split
        owners, (tasks, of_text) = model.owners[place == split], np.unique(model.task[texts], return_inverse=True)
        assert len(tasks) == len(owners)
        functions = np.arange(len(model.planted))[:, None]
        shuffled = list(_draws(owners, np.random.default_rng([0, 1])))
        labels = np.concatenate([draw[of_text] == functions for draw in (owners, *shuffled)])
        precision = Ranked.of(model.scores[texts]).average_precision(labels).reshape(-1, len(functions), LAYERS, UNITS)
        maxima = np.sort(precision[1:].max(3).ravel())
        limit = maxima[min(len(maxima), math.ceil(0.99 * (len(maxima) + 1))) - 1]
        passed.append(precision[0].reshape(len(functions), NEURONS) > limit)
    return passed[0], passed[0] & passed[1]


def _draws(owners: NDArray[np.intp], rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Yield shuffled functions of tasks, in which no function gets exactly its own tasks."""
    for _ in range(DRAWS_BEFORE):
        drawn = owners
        for _ in range(200):
            drawn = rng.permutation(owners)
            if not any(((drawn == f) == (owners == f)).all() for f in np.unique(owners)):
                break
        yield drawn


def found_by_rules(model: Made) -> dict[str, Bools]:
    """Return what each rule finds."""
    one, both = found_before(model)
    return {"before, one split": one, "before, both splits": both, "now": found_now(model)}


def level(world: World, models: int) -> dict[str, Any]:
    """Return, for each rule, the share of models without planted neurons in which any neuron is found, with its 95 % interval."""
    wrong: dict[str, list[bool]] = {}
    for seed in range(models):
        for rule, found in found_by_rules(made(world, seed)).items():
            wrong.setdefault(rule, []).append(bool(found.any()))
    return {rule: {"models": len(any_), "false": sum(any_), **_share(any_)} for rule, any_ in wrong.items()}


def recall(world: World, models: int) -> dict[str, Any]:
    """Return, for each rule, the planted neurons that it finds, by effect, and how many others."""
    total: dict[str, dict[str, Any]] = {}
    for seed in range(models):
        model = made(world, seed, PLANTED)
        for rule, found in found_by_rules(model).items():
            row = total.setdefault(rule, {"planted": 0, "found": 0, "by_effect": dict.fromkeys(map(str, EFFECTS), 0), "false": 0})
            hits = (found & model.planted).any(0)
            row["planted"] += PLANTED
            row["found"] += int(hits.sum())
            row["false"] += int((found & ~model.planted).sum())
            for effect in EFFECTS:
                row["by_effect"][str(effect)] += int((hits & (model.effects == effect)).sum())
    return total


def _share(values: Sequence[bool]) -> dict[str, float]:
    ends = binomtest(sum(values), len(values)).proportion_ci()
    return {"share": sum(values) / len(values), "low": float(ends.low), "high": float(ends.high)}


def main() -> None:
    """Measure all worlds and write the results file."""
    parser = parser_of(__doc__, "neuron-nulls")
    parser.add_argument("--models", type=int, default=500, help="models without planted neurons, a world")
    parser.add_argument("--planted", type=int, default=10, help="models with planted neurons, a world")
    given = parser.parse_args()
    rows = []
    for world in WORLDS:
        rows.append(
            {
                "world": world.name,
                "neurons": NEURONS,
                "level": level(world, given.models),
                "recall": recall(world, given.planted),
            }
        )
        print(rows[-1], flush=True)
    write_results(given.out, {"layers": LAYERS, "planted": PLANTED, "worlds": rows})


if __name__ == "__main__":
    main()
