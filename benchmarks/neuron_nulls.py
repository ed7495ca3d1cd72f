"""Neurons that are planted, and models without any: what the test of `analyze` finds.

    python benchmarks/neuron_nulls.py
    python benchmarks/neuron_nulls.py --models 50 --planted 4

A model is made of scores: every neuron has a level of its own, a deviation on each task that it partly shares with other neurons (wording), and noise on each
text; scores are exponentials, as those of real neurons are skewed. A planted neuron is higher on all tasks of one function by 1 to 7 standard deviations of
the logarithms of its means over tasks. Results go to benchmarks/results/neuron-nulls.json: the share of models without planted neurons in which any neuron is
found, and of the planted neurons those that are found, by whether their effect is above the smallest one that the test says it finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from record import parser_of, write_results
from scipy.stats import binomtest

from workbench.neurons.statistics import TaskTest, task_test

Bools: TypeAlias = NDArray[np.bool_]
LAYERS, UNITS = 30, 24
NEURONS = LAYERS * UNITS
PLANTED, EFFECTS = 64, (1.0, 7.0)
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
    World("7 functions of 12 tasks", (12,) * 7, (8, 10)),
    World("2 to 10 tasks, 3 to 30 texts", (2, 3, 4, 5, 6, 8, 10), (3, 30)),
    World("6 tasks, rare large deviations", (6,) * 7, degrees=3),
    World("6 tasks, two functions vary twice as much", (6,) * 7, spread=2.0),
)


@dataclass(frozen=True)
class Made:
    """Scores of a model: [texts, neurons], the task of each text, the function of each task, the planted pairs [functions, neurons], and their effects."""

    scores: NDArray[np.float32]
    task: NDArray[np.intp]
    owners: NDArray[np.intp]
    planted: Bools
    effects: NDArray[np.float64]


def made(world: World, seed: int, planted: int = 0) -> Made:
    """Return a model's scores."""
    rng = np.random.default_rng([seed, WORLDS.index(world), planted])
    owners = np.repeat(np.arange(len(world.tasks)), world.tasks)
    own, shared = (rng.standard_t(world.degrees, (len(owners), n)) for n in (NEURONS, 20))
    deviations = SPREAD * math.sqrt((1 - 2 / world.degrees) / 2) * (own + shared @ rng.normal(size=(20, NEURONS)) / math.sqrt(20))
    deviations[owners < 2] *= world.spread
    # Means over texts add noise to the deviations on tasks; effects are in standard deviations of both.
    texts = sum(world.texts) / 2
    scale = math.sqrt(SPREAD**2 + NOISE**2 / texts)
    truth = np.zeros((len(world.tasks), NEURONS), bool)
    effects = np.zeros(NEURONS)
    for number, neuron in enumerate(rng.choice(NEURONS, planted, replace=False)):
        function = number % len(world.tasks)
        truth[function, neuron], effects[neuron] = True, rng.uniform(*EFFECTS)
        deviations[owners == function, neuron] += effects[neuron] * scale
    task = np.repeat(np.arange(len(owners)), rng.integers(world.texts[0], world.texts[1] + 1, len(owners)))
    logs = rng.normal(size=NEURONS) + deviations[task] + NOISE * rng.normal(size=(len(task), NEURONS))
    return Made(np.exp(logs.clip(-60, 60), dtype=np.float32), task, owners, truth, effects)


def tested(model: Made) -> TaskTest:
    """Return what the test finds."""
    counts = np.bincount(model.task)[:, None]
    starts = np.searchsorted(model.task, np.arange(len(counts)))
    means = np.add.reduceat(model.scores, starts) / counts
    return task_test(np.split(means, LAYERS, 1), model.owners)


def level(world: World, models: int) -> dict[str, Any]:
    """Return the share of models without planted neurons in which any neuron is found, with its 95 % interval."""
    wrong = [any(of_site.any() for of_site in tested(made(world, seed)).found) for seed in range(models)]
    return {"models": models, "false": sum(wrong), **_share(wrong)}


def recall(world: World, models: int) -> dict[str, Any]:
    """Return how many planted neurons are found, above and below the effect that the test names, and how many others are."""
    total = {"above": 0, "above_found": 0, "below": 0, "below_found": 0, "false": 0}
    named = []
    for seed in range(models):
        model = made(world, seed, PLANTED)
        test = tested(model)
        found = np.concatenate(test.found, 1)
        total["false"] += int((found & ~model.planted).sum())
        named.append(test.smallest)
        for function, neuron in zip(*model.planted.nonzero(), strict=True):
            side = "above" if model.effects[neuron] >= test.smallest[function] else "below"
            total[side] += 1
            total[f"{side}_found"] += int(found[function, neuron])
    limits = np.mean(named, 0)
    return {**total, "named": [float(limit) if np.isfinite(limit) else None for limit in limits]}


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
    write_results(given.out, {"layers": LAYERS, "planted": PLANTED, "effects": EFFECTS, "models": given.planted, "worlds": rows})


if __name__ == "__main__":
    main()
