"""Merges in forward order (FeatCal) and AIM, beside RegMean, tsv and the sum: the source of a table in docs/merging-methods.md.

    python benchmarks/merge_forward.py
    python benchmarks/merge_forward.py --families llama --pools same-3 --seeds 1       a quick look
    python benchmarks/merge_forward.py --folder DIR                                    keeps models, so that a later call goes on
    python benchmarks/merge_forward.py --only learned                                  measures an arm and its references again

Pools, items and `kept` are those of benchmarks/merge_pools.py; the pools of the starter base are made of its own bricks. Each brick gives some training
texts. `against` is the paired difference in kept points from the arm's reference over the same items, with a 95 %
interval. Results go to benchmarks/results/merge-forward.json after every pool.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import learned_weights  # noqa: F401  # registers `merge: learned`
import torch
from merge_pools import SUM, TSV, merged_into, pools
from pool_starter import StarterTraining, StarterWorld
from pool_worlds import World
from record import keep_head, parser_of, write_results

from workbench.scores.paired import paired

ENOUGH = 0.3
"""Least gain of an owner for which `kept` is computed."""
STARTER = {"three": ("add", "reverse", "triage"), "six": ("add", "reverse", "triage", "actions", "glossary", "record")}
SMALL = ("disjoint-3", "same-3", "same-2 and another", "partial", "full-3", "full-same-3")
REGMEAN, FEATCAL, LEARNED = {"merge": "regmean"}, {"merge": "featcal"}, {"merge": "learned"}
# Arm -> its reference, and its step; AIM has the step that it damps.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", SUM),
    "sum .5": ("sum", {**SUM, "lambda": 0.5}),
    "tsv": ("sum", TSV),
    "regmean": ("sum", REGMEAN),
    "featcal": ("regmean", FEATCAL),
    "featcal, blend 0": ("featcal", {**FEATCAL, "blend": 0.0}),
    "featcal, blend 1": ("featcal", {**FEATCAL, "blend": 1.0}),
    "featcal, ridge .005": ("featcal", {**FEATCAL, "ridge": 0.005}),
    "featcal, sum 1": ("featcal", {**FEATCAL, "lambda": 1.0, "anchor": 1.0}),
    "sum, .3 to 1 by depth": ("sum", {**SUM, "lambda": {"first": 0.3, "last": 1.0}}),
    "learned": ("featcal", LEARNED),
    "learned, a weight a brick": ("learned", {**LEARNED, "per": "brick"}),
    "aim on sum": ("sum", SUM),
    "aim on tsv": ("tsv", TSV),
}


def main() -> None:
    """Merge all pools with all arms, and write the results file."""
    parser = parser_of(__doc__, "merge-forward")
    parser.add_argument("--families", nargs="+", choices=("starter", "llama"), default=["starter", "llama"])
    parser.add_argument("--seeds", type=int, default=2, help="number of small bases")
    parser.add_argument("--pools", nargs="+", help="names of pools; default: all")
    parser.add_argument("--texts", type=int, default=16, help="texts of each brick")
    parser.add_argument("--folder", type=Path, help="folder of the models to keep")
    parser.add_argument(
        "--only", nargs="*", choices=list(ARMS), default=list(ARMS), help="arms; those of the results file are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    only = {one for arm in options.only for one in (arm, ARMS[arm][0], ARMS[ARMS[arm][0]][0])}
    before = json.loads(options.out.read_text("utf-8")) if len(only) < len(ARMS) else {"rows": []}
    known = {(row["family"], row["seed"], row["pool"]): row["arms"] for row in before["rows"]}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for family, seed in [("starter", 0)] + [("llama", seed) for seed in range(options.seeds)]:
            if family not in options.families:
                continue
            folder = (options.folder or Path(temporary)) / f"{family}-{seed}"
            world: Any = StarterWorld(folder, seed) if family == "starter" else World(folder, seed)
            world.make_base(1000)
            chosen: dict[str, Any] = {name: [StarterTraining((task,)) for task in tasks] for name, tasks in STARTER.items()}
            if family == "llama":
                chosen = {name: made for name, made in pools(random.Random(f"{family} {seed}")).items() if name in SMALL}
            for name, trainings in chosen.items():
                if options.pools and name not in options.pools:
                    continue
                arms = known.get((family, seed, name), {}) | measured(world, trainings, options.texts, only)
                rows.append({"family": family, "seed": seed, "pool": name, "arms": arms})
                print(json.dumps(rows[-1]), flush=True)
                write_results(options.out, {"texts": options.texts, "rows": rows})
    if before["rows"]:
        keep_head(options.out, before, options.only)


def measured(world: Any, trainings: Sequence[Any], count: int, only: set[str]) -> dict[str, Any]:
    """Merge one pool with some arms, and score the merges."""
    places = {f"b{i}": world.brick(training, 200) for i, training in enumerate(trainings)}
    texts = {name: world.texts(training) for name, training in zip(places, trainings, strict=True)}
    live = world.model()
    tasks = list(dict.fromkeys(task for training in trainings for task in training.tasks))
    alone, owned = answers(world, live, tasks), dict[Any, list[bool]]()
    for name, training in zip(places, trainings, strict=True):
        merged_into(live, world, places, {**SUM, "bricks": [name]})
        for task, right in answers(world, live, training.tasks).items():
            owned.setdefault(task, []).extend(right)
    gains = {task: share(owned[task]) - share(alone[task]) for task in tasks}
    learned = [task for task in tasks if gains[task] >= ENOUGH]
    found, points = dict[str, Any](), dict[str, list[float]]()
    for arm, (reference, step) in ARMS.items():
        if not learned:
            break
        if arm not in only:
            continue
        started = time.process_time()
        reads = step["merge"] in ("regmean", "featcal", "learned")
        bricks = {name: {"calibration": str(file)} for name, file in texts.items()} if reads else list(places)
        if arm.startswith("aim"):
            damped_into(live, world, places, step, [line for file in texts.values() for line in evenly(file, count)])
        else:
            merged_into(live, world, places, {**step, "bricks": bricks, **({"samples": count} if reads else {})})
        seconds = time.process_time() - started
        now_right = answers(world, live, learned)
        # Each item counts for the share of the owner's gain that it stands for, so that their mean is `kept`.
        points[arm] = [
            (now - before) / gains[task] for task in learned for now, before in zip(now_right[task], alone[task], strict=True)
        ]
        pair = paired(points[reference], points[arm])
        low, high = pair.interval()
        found[arm] = {
            "kept": share(points[arm]),
            "retention": world.retention(live),
            "seconds": round(seconds, 1),
            "reference": reference,
            "against": {"diff": pair.diff, "low": low, "high": high},
        }
    return found


def damped_into(live: Any, world: Any, places: dict[str, Path], step: dict[str, Any], lines: Sequence[str]) -> None:
    """Put a merge into a live model, damped by `merge: aim` on texts, lines of JSON."""
    texts, inner = world.folder / "aim.jsonl", world.folder / "aim.yaml"
    texts.write_text("\n".join(lines) + "\n", "utf-8")
    recipe = {"version": 1, "base": str(world.base), "bricks": {n: str(p) for n, p in places.items()}, "steps": [step]}
    inner.write_text(json.dumps(recipe), "utf-8")
    merged_into(live, world, {"mix": {"recipe": str(inner)}}, {"merge": "aim", "calibration": str(texts)})


def evenly(file: Path, count: int) -> list[str]:
    """Return lines of a file, evenly spaced."""
    lines = file.read_text("utf-8").splitlines()
    return [lines[i * len(lines) // count] for i in range(min(count, len(lines)))]


def answers(world: Any, live: Any, tasks: Sequence[Any]) -> dict[Any, list[bool]]:
    """Return the right answers of a model on some tasks."""
    return {task: world.answers(live, task) for task in tasks}


def share(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
