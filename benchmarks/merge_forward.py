"""Merges that look at merged inputs, layer after layer, beside RegMean and the sum: the source of a table in docs/merging-methods.md.

    python benchmarks/merge_forward.py
    python benchmarks/merge_forward.py --families llama --pools same-3 --seeds 1       a quick look
    python benchmarks/merge_forward.py --folder DIR                                    keeps models, so that a later call goes on

The arms are written here from their formulas, and none of them is a method of the workbench:

    regmean               each brick's Grams from its own model (as `merge: regmean` does)
    regmean++             the Grams of layer l from the brick's layer l, on inputs that passed through the merged layers below (2508.03121)
    featcal               each linear layer fitted to what the bricks' layers make of inputs between their own and the merged model's, with
                          an anchor at the merge (2605.13030); with the published settings, and with others
    aim on sum, on tsv    columns of the delta damped by the mean absolute input of the base (2502.02421), omega .2

Each brick gives some training texts. Pools, items and `kept` are those of benchmarks/merge_pools.py; the pools of the starter base
are made of its own bricks. `against` is the paired difference in kept points from the arm's reference over the same items, with a 95 % interval.
Results go to benchmarks/results/merge-forward.json after every pool.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from merge_pools import SUM, TSV, merged_into, pools
from pool_starter import StarterTraining, StarterWorld
from pool_worlds import World
from record import parser_of, write_results
from torch import Tensor
from torch.func import functional_call

from workbench.merge.measuring.least_squares import solve
from workbench.scores.paired import paired

State = dict[str, Tensor]
RIDGE, OMEGA, ENOUGH = 1e-3, 0.2, 0.3
"""The ridge of `regmean`; AIM's published omega; the least gain of an owner for which `kept` is computed."""
STARTER = {"three": ("add", "reverse", "triage"), "six": ("add", "reverse", "triage", "actions", "glossary", "record")}
SMALL = ("disjoint-3", "same-3", "same-2 and another", "partial", "full-3", "full-same-3")


@dataclass(frozen=True)
class Scene:
    """What the arms merge.

    Attributes:
        live: A model of the base's shape.
        base: The base's weights.
        bricks: Each brick's weights.
        texts: Each brick's texts as tokens [1, length].
    """

    live: Any
    base: State
    bricks: list[State]
    texts: list[list[Tensor]]

    def layer(self, number: int, state: State) -> State:
        """Return the weights of one decoder layer."""
        prefix = f"model.layers.{number}."
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    def linear(self, number: int) -> list[str]:
        """Return the linear modules of one decoder layer."""
        return [name for name, module in self.live.model.layers[number].named_modules() if isinstance(module, torch.nn.Linear)]


class _FirstLayer(Exception):  # noqa: N818 - it ends a pass, nothing is wrong
    pass


def entries(scene: Scene, state: State, brick: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return what enters the first layer for each text of a brick: hidden states and the layer's other arguments."""
    found = []

    def take(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0], kwargs))
        raise _FirstLayer

    handle = scene.live.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    for tokens in scene.texts[brick]:
        with suppress(_FirstLayer):
            functional_call(scene.live, state, (), {"input_ids": tokens, "use_cache": False})
    handle.remove()
    return found


@contextmanager
def inputs_of(layer: Any, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs [tokens, width] of some linear modules."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    yield found
    for handle in handles:
        handle.remove()


def run(
    scene: Scene, number: int, state: State, hidden: Sequence[tuple[Tensor, dict[str, Any]]]
) -> tuple[Any, dict[str, Tensor]]:
    """Run one layer with some weights; return the next hidden states and the inputs of its linear modules."""
    layer, after = scene.live.model.layers[number], []
    with inputs_of(layer, scene.linear(number)) as found:
        for states, arguments in hidden:
            out = functional_call(layer, scene.layer(number, state), (states,), arguments)
            after.append((out[0] if isinstance(out, tuple) else out, arguments))
    return after, {name: torch.cat(rows) for name, rows in found.items()}


def mean_of(scene: Scene) -> State:
    """Return the mean of the bricks' weights."""
    return {name: sum(brick[name] for brick in scene.bricks) / len(scene.bricks) for name in scene.base}  # type: ignore[misc]


def regmean(scene: Scene, *, merged_inputs: bool, off_diagonal: float) -> State:
    """Return RegMean's weights, with Grams from each brick's own model or from inputs that passed through the merged layers below."""
    merged = mean_of(scene)
    hidden = [entries(scene, merged if merged_inputs else brick, i) for i, brick in enumerate(scene.bricks)]
    for number in range(len(scene.live.model.layers)):
        seen = [run(scene, number, brick, hidden[i]) for i, brick in enumerate(scene.bricks)]
        for name in scene.linear(number):
            key = f"model.layers.{number}.{name}.weight"
            grams = [shrunk(inputs[name], off_diagonal) for _, inputs in seen]
            deltas = [brick[key] - scene.base[key] for brick in scene.bricks]
            merged[key] = scene.base[key] + solve(deltas, [lambda g=g: g for g in grams], [1.0] * len(deltas), RIDGE)
        hidden = [run(scene, number, merged, states)[0] for states in hidden] if merged_inputs else [after for after, _ in seen]
    return merged


def shrunk(inputs: Tensor, off_diagonal: float) -> Tensor:
    """Return the mean of x xᵀ with its off-diagonal elements scaled."""
    gram = inputs.double().T @ inputs.double() / len(inputs)
    return gram * off_diagonal + gram.diagonal().diag() * (1 - off_diagonal)


def featcal(scene: Scene, start: State, *, rho: float, ridge: float, alpha: float) -> State:
    """Return FeatCal's weights: each linear layer solved in float64, in forward order.

    W = (Σ C/‖C‖ + λI)⁻¹ (Σ Xₛᵀ Xₜ/‖C‖ · Wᵢ + λ (ρ W + (1 − ρ) W₀)) with Xₛ the inputs in the calibrated model, Xₜ = α Xᵢ + (1 − α) Xₛ, and C = XₛᵀXₛ.
    """
    merged = dict(start)
    students = [entries(scene, merged, i) for i in range(len(scene.bricks))]
    teachers = [entries(scene, brick, i) for i, brick in enumerate(scene.bricks)]
    for number in range(len(scene.live.model.layers)):
        own = [run(scene, number, merged, states)[1] for states in students]
        taught = [run(scene, number, brick, teachers[i]) for i, brick in enumerate(scene.bricks)]
        for name in scene.linear(number):
            key = f"model.layers.{number}.{name}.weight"
            width = scene.base[key].shape[1]
            left = (ridge + 1e-8) * torch.eye(width, dtype=torch.float64)
            right = ridge * (rho * merged[key].double() + (1 - rho) * scene.base[key].double()).T
            for brick, inputs, (_, other) in zip(scene.bricks, own, taught, strict=True):
                student = inputs[name].double()
                teacher = alpha * other[name].double() + (1 - alpha) * student
                norm = (student.T @ student).norm()
                left += student.T @ student / norm
                right += student.T @ teacher / norm @ brick[key].double().T
            merged[key] = torch.linalg.solve(left, right).T.float()
        students = [run(scene, number, merged, states)[0] for states in students]
        teachers = [after for after, _ in taught]
    return merged


def aim(scene: Scene, start: State) -> State:
    """Return a merge whose deltas are damped in the columns that the base uses most."""
    merged = dict(start)
    hidden = [entries(scene, scene.base, i) for i in range(len(scene.bricks))]
    for number in range(len(scene.live.model.layers)):
        seen = [run(scene, number, scene.base, states) for states in hidden]
        for name in scene.linear(number):
            key = f"model.layers.{number}.{name}.weight"
            used = torch.cat([inputs[name] for _, inputs in seen]).abs().mean(0)
            merged[key] = scene.base[key] + (start[key] - scene.base[key]) * (1 - (1 - OMEGA) * used / used.max())
        hidden = [after for after, _ in seen]
    return merged


Starts = Mapping[str, State]
PUBLISHED = {"rho": 2.2, "ridge": 0.05, "alpha": 0.25}
# Arm -> its reference, and its function of the scene and of the plain merges.
ARMS: dict[str, tuple[str, Callable[[Scene, Starts], State]]] = {
    "sum": ("sum", lambda _, starts: starts["sum"]),
    "tsv": ("sum", lambda _, starts: starts["tsv"]),
    "regmean": ("sum", lambda scene, _: regmean(scene, merged_inputs=False, off_diagonal=0.5)),
    "regmean++": ("regmean", lambda scene, _: regmean(scene, merged_inputs=True, off_diagonal=0.5)),
    "regmean++, off-diagonal .1": ("regmean", lambda scene, _: regmean(scene, merged_inputs=True, off_diagonal=0.1)),
    "featcal, sum .3 (published)": ("regmean", lambda scene, starts: featcal(scene, starts["sum .3"], **PUBLISHED)),
    "featcal, sum": ("regmean", lambda scene, starts: featcal(scene, starts["sum"], **{**PUBLISHED, "rho": 1.0})),
    "featcal, sum, alpha 0": ("regmean", lambda scene, starts: featcal(scene, starts["sum"], rho=1.0, ridge=0.05, alpha=0.0)),
    "featcal, sum, alpha 1": ("regmean", lambda scene, starts: featcal(scene, starts["sum"], rho=1.0, ridge=0.05, alpha=1.0)),
    "featcal, sum, ridge .005": (
        "regmean",
        lambda scene, starts: featcal(scene, starts["sum"], rho=1.0, ridge=0.005, alpha=0.25),
    ),
    "aim on sum": ("sum", lambda scene, starts: aim(scene, starts["sum"])),
    "aim on tsv": ("tsv", lambda scene, starts: aim(scene, starts["tsv"])),
}


def main() -> None:
    """Merge all pools with all arms, and write the results file."""
    parser = parser_of(__doc__, "merge-forward")
    parser.add_argument("--families", nargs="+", choices=("starter", "llama"), default=["starter", "llama"])
    parser.add_argument("--seeds", type=int, default=2, help="number of small bases")
    parser.add_argument("--pools", nargs="+", help="names of pools; default: all")
    parser.add_argument("--texts", type=int, default=16, help="texts of each brick")
    parser.add_argument("--folder", type=Path, help="folder of the models to keep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for family, seed in [("starter", 0)] + [("llama", seed) for seed in range(options.seeds)]:
            if family not in options.families:
                continue
            folder = (options.folder or Path(temporary)) / f"{family}-{seed}"
            world: Any = StarterWorld(folder, seed) if family == "starter" else World(folder, family, seed)
            world.make_base(1000)
            chosen: dict[str, Any] = {name: [StarterTraining((task,)) for task in tasks] for name, tasks in STARTER.items()}
            if family == "llama":
                chosen = {name: made for name, made in pools(random.Random(f"{family} {seed}")).items() if name in SMALL}
            for name, trainings in chosen.items():
                if options.pools and name not in options.pools:
                    continue
                rows.append({"family": family, "seed": seed, "pool": name, "arms": measured(world, trainings, options.texts)})
                print(json.dumps(rows[-1]), flush=True)
                write_results(options.out, {"texts": options.texts, "rows": rows})


def measured(world: Any, trainings: Sequence[Any], count: int) -> dict[str, Any]:
    """Merge one pool with every arm, and score the merges."""
    places = {f"b{i}": world.brick(training, 200) for i, training in enumerate(trainings)}
    live = world.model()
    base = snapshot(live)
    bricks = [merge(live, world, places, {**SUM, "bricks": [name]}) for name in places]
    scene = Scene(live, base, bricks, [world.texts(training, count) for training in trainings])
    tasks = list(dict.fromkeys(task for training in trainings for task in training.tasks))
    alone, owners = scored(world, live, base, tasks), dict[Any, list[bool]]()
    for brick, training in zip(bricks, trainings, strict=True):
        for task, right in scored(world, live, brick, list(training.tasks)).items():
            owners.setdefault(task, []).extend(right)
    gains = {task: share(owners[task]) - share(alone[task]) for task in tasks}
    if not (learned := [task for task in tasks if gains[task] >= ENOUGH]):
        return {}
    starts = {
        name: merge(live, world, places, step)
        for name, step in {"sum": SUM, "sum .3": {**SUM, "lambda": 0.3}, "tsv": TSV}.items()
    }
    found, points = dict[str, Any](), dict[str, list[float]]()
    for arm, (reference, make) in ARMS.items():
        started = time.process_time()
        with torch.no_grad():
            state = make(scene, starts)
        seconds = time.process_time() - started
        right = scored(world, live, state, learned)
        # Each item counts for the share of the owner's gain that it stands for, so that their mean is `kept`.
        points[arm] = [
            (now - before) / gains[task] for task in learned for now, before in zip(right[task], alone[task], strict=True)
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


def merge(live: Any, world: Any, places: dict[str, Path], step: dict[str, Any]) -> State:
    """Return the weights of a merge of the workbench."""
    merged_into(live, world, places, step)
    return snapshot(live)


def snapshot(live: Any) -> State:
    """Return a copy of a model's weights."""
    return {name: tensor.detach().clone() for name, tensor in live.state_dict().items()}


def scored(world: Any, live: Any, state: State, tasks: Sequence[Any]) -> dict[Any, list[bool]]:
    """Return the right answers of some weights."""
    live.load_state_dict(state)
    return {task: world.answers(live, task) for task in tasks}


def share(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
