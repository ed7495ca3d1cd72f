"""Merge pools of bricks that chose no rule, and compare what `workbench brick advise` recommends with a grid: the source of the tables in docs/merging.md.

    python benchmarks/merge_pools.py
    python benchmarks/merge_pools.py --families llama --seeds 1 --pools disjoint-3     a quick look
    python benchmarks/merge_pools.py --folder DIR                                       keeps models and scores, so that a later call goes on
    python benchmarks/merge_pools.py --families starter --base DIR --out FILE           another language model in the starter base's place

A small base, a Llama of four layers, is trained here with three seeds (benchmarks/pool_worlds.py), and so are all bricks, which learn
functions that the base knows behind new markers. Bricks of the starter base are trained with one seed
(benchmarks/pool_starter.py). Each pool is merged by every configuration of the grid and scored on held-out items, 200 a task and 60 on the starter
base; an item counts if every token of the answer is the most likely one. `kept` is the mean over the pool's tasks of
(merged - base) / (owner - base), where the owner is the brick that learned the task, or the mean of those that did; tasks on which the owner gains less than
0.3 do not count. `retention` is the accuracy on the base's own
functions. Results go to benchmarks/results/merge-pools.json after every pool.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pool_starter import STARTER, StarterWorld, starter_pools
from pool_worlds import BASE, Training, World, skill
from record import parser_of, write_results

from workbench.advice.advise import advise
from workbench.models.layout import Model
from workbench.models.live import compute
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.run.device import Work

CPU = torch.device("cpu")
LEARNED = 0.3
"""Least gain in accuracy of a task that counts as learned; `kept` is the mean over these tasks."""
FAMILIES = ("starter", "llama")
SUM, TSV, TIES = {"merge": "task_arithmetic"}, {"merge": "tsv"}, {"merge": "ties"}
AUTO = {"weights": "auto"}
GRID: dict[str, dict[str, Any]] = {
    "average": {"merge": "average"},
    "sum 0.5": {**SUM, "lambda": 0.5},
    "sum 0.7": {**SUM, "lambda": 0.7},
    "sum": SUM,
    "sum, auto": {**SUM, **AUTO},
    "tsv 0.7": {**TSV, "lambda": 0.7},
    "tsv": TSV,
    "tsv, auto": {**TSV, **AUTO},
    "ties": TIES,
    "ties, auto": {**TIES, **AUTO},
    "dare": {"merge": "dare"},
    "iso_c": {"merge": "iso_c"},
}


def pools(draw: random.Random) -> dict[str, list[Training]]:
    """Return the pools of one seed: name -> trainings. Skills are drawn; bricks that several pools share are trained once."""
    # The base's function 0 copies, which it does behind every marker already.
    a, b, c, d, e, f = (skill(number) for number in draw.sample(range(1, len(BASE)), 6))
    one = [Training((a,), draw=i) for i in range(3)]
    full = [Training((t,), rank=None) for t in (a, b, c)]
    return {
        "disjoint-3": [one[0], Training((b,)), Training((c,))],
        "disjoint-6": [one[0], *(Training((t,)) for t in (b, c, d, e, f))],
        "same-3": one,
        "same-2 and another": [*one[:2], Training((b,))],
        "partial": [Training((a, b)), Training((b, c)), Training((c, a))],
        "full-3": full,
        "full-same-3": [full[0], *(Training((a,), rank=None, draw=i) for i in (1, 2))],
        "full and adapters": [full[0], Training((b,)), Training((c,))],
        "ranks 4, 16, 64": [Training((a,), rank=4), Training((b,), rank=16), Training((c,), rank=64)],
        "same, ranks 4, 16, 64": [Training((a,), rank=4), Training((a,), rank=16, draw=1), Training((a,), rank=64, draw=2)],
        "modules": [Training((a,), modules="attention"), Training((b,), modules="mlp"), Training((c,))],
        "contradicting": [one[0], Training((skill(b.function, a.function),))],
    }


def main() -> None:
    """Train, merge, score and write the results file."""
    parser = parser_of(__doc__, "merge-pools")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pools", nargs="+", help="names of pools; default: all")
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of a base, 64 rows each")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a brick")
    parser.add_argument("--folder", type=Path, help="folder of the models to keep")
    parser.add_argument("--base", type=Path, default=STARTER, help="folder of the language model of the family `starter`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    settings = {"base_steps": options.base_steps, "steps": options.steps}
    settings |= {} if options.base == STARTER else {"base": options.base.name}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            for family in options.families[seed > 0 and options.families[0] == "starter" :]:
                folder = (options.folder or Path(temporary)) / f"{family}-{seed}"
                world: Any = (
                    StarterWorld(folder, seed, base=options.base.resolve()) if family == "starter" else World(folder, seed)
                )
                base = world.make_base(options.base_steps)
                drawn = random.Random(f"{family} {seed}")
                made: dict[str, Any] = starter_pools(drawn) if family == "starter" else pools(drawn)
                for name, trainings in made.items():
                    if options.pools and name not in options.pools:
                        continue
                    found = measured(world, trainings, options.steps, folder / "scored" / f"{name}.json")
                    rows.append({"family": family, "seed": seed, "pool": name, "base": base, **found})
                    print(json.dumps(rows[-1]), flush=True)
                    write_results(options.out, {**settings, "grid": GRID, "rows": rows})


def measured(world: Any, trainings: Sequence[Any], steps: int, kept: Path) -> dict[str, Any]:
    """Train the bricks of a pool, merge them with every configuration, and ask for advice.

    Args:
        world: The base and its tasks.
        trainings: Settings of the bricks.
        steps: Training steps of a brick.
        kept: File of the scores, which a later call reads: only what is missing there is computed.
    """
    places = {f"b{i}": world.brick(training, steps) for i, training in enumerate(trainings)}
    tasks = list(dict.fromkeys(task for training in trainings for task in training.tasks))
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    live = world.model()
    if "owners" not in found:
        found = {"alone": [world.accuracy(live, task) for task in tasks], "merged": {}}
        owners: dict[Any, list[float]] = {task: [] for task in tasks}
        for name, training in zip(places, trainings, strict=True):
            merged_into(live, world, places, {**SUM, "bricks": [name]})
            for task in training.tasks:
                owners[task].append(world.accuracy(live, task))
        found["owners"] = [sum(owners[task]) / len(owners[task]) for task in tasks]
    for name, step in GRID.items():
        if name not in found["merged"]:
            merged_into(live, world, places, step)
            found["merged"][name] = [[world.accuracy(live, task) for task in tasks], world.retention(live)]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found), "utf-8")
    advice = advise({n: str(p) for n, p in places.items()}, str(world.base), {}, project=world.folder, work=Work(CPU, 1))
    return {
        "bricks": [training.name() for training in trainings],
        "alone": found["alone"],
        "owners": found["owners"],
        "rv": {f"{p.one} {p.two}": p.rv for p in advice.pairs},
        "cosine": {f"{p.one} {p.two}": p.cosine for p in advice.pairs},
        "norms": {brick.name: brick.relative_norm for brick in advice.bricks},
        "weights": {brick.name: brick.weight for brick in advice.bricks},
        "regime": advice.regime,
        "recommended": advice.step,
        "scores": {name: scored(found, *found["merged"][name]) for name in GRID},
    }


def scored(found: Mapping[str, Any], accuracies: Sequence[float], retention: float) -> dict[str, Any]:
    """Return what a merge keeps of the owners' gains, over the tasks that they learned; None if they learned none."""
    gains = [owner - alone for owner, alone in zip(found["owners"], found["alone"], strict=True)]
    shares = [(now - alone) / gain for now, alone, gain in zip(accuracies, found["alone"], gains, strict=True) if gain >= LEARNED]
    return {"kept": sum(shares) / len(shares) if shares else None, "accuracies": accuracies, "retention": retention}


def merged_into(live: Any, world: Any, places: Mapping[str, Path | dict[str, str]], step: dict[str, Any]) -> None:
    """Put the weights of a merge of bricks, directories or `{recipe: FILE}`, into a live model of the base's shape."""
    bricks = {name: place if isinstance(place, dict) else str(place) for name, place in places.items()}
    data = {"version": 1, "base": str(world.base), "bricks": bricks, "steps": [step]}
    composed: Model = compose(resolve(from_data(data, world.folder)), CPU).model
    tensors = compute(composed, torch.float32, CPU)
    missing = live.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys, missing
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing


if __name__ == "__main__":
    main()
