"""Bricks far from their base: merges beside ways that train, and a route, all with the same texts: the source of a table in docs/merging-advice.md.

    python benchmarks/far_bricks.py
    python benchmarks/far_bricks.py --seeds 1 --pools disjoint-3 --folder DIR     a quick look; DIR keeps models, so that a later call goes on

Pools, held-out rows and `kept` are those of the small Llamas in benchmarks/merge_pools.py, whose bricks change the base by more than 15 % of
its norm. Each way reads the same 64 rows of each brick's tasks, which are not held out. Ways that train take as many steps as a brick, and
replay 64 rows of the base's own functions: the base learns from the rows alone, or from the predictions of the brick that predicts a row
best; or a merge of the bricks learns from the rows. Results go to benchmarks/results/far-bricks.json after every pool.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import learned_weights  # noqa: F401  # registers `merge: learned`
import torch
from merge_pools import LEARNED, pools
from pool_worlds import BASE_TASKS, LENGTH, WORDS, Training, World
from record import parser_of, write_results

from workbench.advice.groups import Group
from workbench.advice.runner import Runner
from workbench.models.texts import read_texts
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute

CHOSEN = ("disjoint-3", "disjoint-6", "partial", "full-3", "ranks 4, 16, 64")
ROWS = 64
WORK = Work(torch.device("cpu"), 1)
TRAINED = {
    "data": "all.jsonl",
    "replay": "replay.jsonl",
    "replay_share": 0.25,
    "replay_tokens": LENGTH,
    "method": "lora",
    "rank": 16,
    "alpha": 32,
    "learning_rate": 1e-3,
    "steps": 200,
    "batch_size": 64,
    "save_every": 0,
}
WAYS: dict[str, list[dict[str, Any]]] = {
    "average": [{"merge": "average"}],
    "tsv, auto": [{"merge": "tsv", "weights": "auto"}],
    "featcal": [{"merge": "featcal"}],
    "learned": [{"merge": "learned"}],
    "the rows alone": [{"grow": "brick", **TRAINED}],
    "taught by the bricks": [{"fuse": "mince", "with_base": False, "weight": 0.9, "top_k": 10, **TRAINED}],
    "average, then trained": [{"merge": "average"}, {"grow": "brick", **TRAINED}],
    "featcal, then trained": [{"merge": "featcal"}, {"grow": "brick", **TRAINED}],
}


def main() -> None:
    """Merge, train and route the bricks of every pool, and write the results file."""
    parser = parser_of(__doc__, "far-bricks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pools", nargs="+", default=list(CHOSEN))
    parser.add_argument("--folder", type=Path, help="folder of the models to keep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            world = World((options.folder or Path(temporary)).resolve() / f"llama-{seed}", seed)
            world.make_base(1000)
            made = pools(random.Random(f"llama {seed}"))
            for name in options.pools:
                kept = world.folder / f"{name}.json"
                if not kept.is_file():
                    kept.write_text(json.dumps(measured(world, made[name])), "utf-8")
                rows.append({"seed": seed, "pool": name, **json.loads(kept.read_text("utf-8"))})
                print(json.dumps(rows[-1]), flush=True)
                write_results(options.out, {"rows_a_brick": ROWS, "rows": rows})


def measured(world: World, trainings: Sequence[Training]) -> dict[str, Any]:
    """Return what each way keeps of the owners' gains, what it leaves of the base's functions, and its seconds."""
    places = {f"b{i}": world.brick(training, 200) for i, training in enumerate(trainings)}
    tasks = list(dict.fromkeys(task for training in trainings for task in training.tasks))
    texts = {name: written(world, training, name) for name, training in zip(places, trainings, strict=True)}
    together = [line for file in texts.values() for line in file.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(together)
    (world.folder / "all.jsonl").write_text("\n".join(together) + "\n", "utf-8")
    own = [row for task in BASE_TASKS for row in task.rows(ROWS // len(BASE_TASKS), seed=-2).tolist()]
    (world.folder / "replay.jsonl").write_text("".join(lines_of(own)), "utf-8")
    alone = [world.accuracy(world.model(), task) for task in tasks]
    owners: dict[Any, list[float]] = {task: [] for task in tasks}
    for name, training in zip(places, trainings, strict=True):
        live, _ = made(world, {name: places[name]}, [{"merge": "task_arithmetic"}])
        for task in training.tasks:
            owners[task].append(world.accuracy(live, task))
    gains = [sum(owners[task]) / len(owners[task]) - before for task, before in zip(tasks, alone, strict=True)]

    def kept(accuracies: Sequence[float]) -> float:
        shares = [(now - old) / gain for now, old, gain in zip(accuracies, alone, gains, strict=True) if gain >= LEARNED]
        return sum(shares) / len(shares)

    found = {}
    for way, steps in WAYS.items():
        live, seconds = made(world, places, [with_texts(step, texts) for step in steps])
        found[way] = {
            "kept": kept([world.accuracy(live, task) for task in tasks]),
            "retention": world.retention(live),
            "seconds": round(seconds, 1),
        }
    if all(training.rank is not None for training in trainings):  # a router chooses among adapters
        found["route"] = routed(world, places, texts, trainings, kept, tasks)
    return {"bricks": [training.name() for training in trainings], "gains": gains, "ways": found}


def with_texts(step: Mapping[str, Any], texts: Mapping[str, Path]) -> dict[str, Any]:
    """Return a step with what it reads."""
    if step.get("merge") in ("featcal", "learned"):
        return {**step, "bricks": {name: {"calibration": str(file)} for name, file in texts.items()}, "samples": ROWS}
    return {**step, "teachers": list(texts)} if "fuse" in step else {**step}


def made(world: World, places: Mapping[str, Path], steps: Sequence[Mapping[str, Any]]) -> tuple[Any, float]:
    """Return the model of a recipe, and the seconds of a core that it took."""
    data = {
        "version": 1,
        "base": str(world.base),
        "bricks": {name: str(place) for name, place in places.items()},
        "steps": list(steps),
        "output": {"dtype": "float32"},
    }
    with tempfile.TemporaryDirectory(dir=world.folder) as out:
        started = time.process_time()
        result = execute(resolve(from_data(data, world.folder)), Path(out), WORK)
        seconds = time.process_time() - started
        return world.model(Path(result.to_dict()["model"])), seconds


def routed(
    world: World,
    places: Mapping[str, Path],
    texts: Mapping[str, Path],
    trainings: Sequence[Training],
    kept: Any,
    tasks: Sequence[Any],
) -> dict[str, Any]:
    """Return what a route between all bricks keeps, fitted on the rows and asked the held-out ones."""
    asked = {name: written(world, training, f"{name}-asked", seed=-1) for name, training in zip(places, trainings, strict=True)}
    items = {name: read_texts(file, name) for name, file in asked.items()}
    runner = Runner({n: str(p) for n, p in places.items()}, str(world.base), items, world.folder, WORK, 10**6)
    runner.fit_on({name: read_texts(file, name) for name, file in texts.items()})
    started = time.process_time()
    answers, price, ties = runner.route([Group(name=name, bricks=[name], step=None) for name in places])
    right: dict[Any, list[float]] = {task: [] for task in tasks}
    for name, training in zip(places, trainings, strict=True):
        count = len(answers.right[name]) // len(training.tasks)
        for i, task in enumerate(training.tasks):
            right[task] += list(answers.right[name][i * count : (i + 1) * count])
    accuracies = [sum(values) / len(values) for values in right.values()]
    return {"kept": kept(accuracies), "seconds": round(time.process_time() - started, 1), "bytes": price.bytes, "ties": ties}


def written(world: World, training: Training, name: str, seed: int = -2) -> Path:
    """Write rows of a brick's tasks, and return their file; -1 is the seed of those that are held out."""
    out = world.folder / f"{name}.jsonl"
    rows = [
        row for task in training.tasks for row in task.rows(200 if seed == -1 else ROWS // len(training.tasks), seed).tolist()
    ]
    out.write_text("".join(lines_of(rows)), "utf-8")
    return out


def lines_of(rows: Sequence[Sequence[int]]) -> list[str]:
    """Return rows of token ids as lines with a prompt and its answer."""
    words = [[WORDS[i] for i in row] for row in rows]
    return [json.dumps({"prompt": " ".join(row[:-LENGTH]), "completion": " ".join(row[-LENGTH:])}) + "\n" for row in words]


if __name__ == "__main__":
    main()
