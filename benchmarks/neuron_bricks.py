"""Unlearn and move functions with sets of neurons, beside LoRA adapters that write as many values: the source of a table in docs/neurons-sets.md.

    python benchmarks/neuron_bricks.py
    python benchmarks/neuron_bricks.py --functions math --folder DIR      DIR keeps sets, adapters and losses, so that a later call goes on

`workbench analyze` chooses 5 % of the starter base's neurons for each of seven functions, on the train tasks. An adapter of rank 4 is
trained on the same tasks' answers. Both are applied at several strengths, and the loss of the answers of held-out tasks is measured, on the function's
own items and on those of the six others:

    scaled      `edit: scale_neurons`; strength 1 switches the set off
    random      the same with random neurons of the same mean activation
    subtracted  `merge: task_arithmetic` of the adapter; strength 1 subtracts it once, -1 adds it
    at the set  the same, of the adapter's changes to the set's rows and columns of the feed-forward matrices alone
    at random   the same at the random neurons

Then each two sets are switched off together. Results go to benchmarks/results/neuron-bricks.json: for each function, way and strength, and
for each pair, the loss by function.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_pools import merged_into
from record import parser_of, write_results
from safetensors.torch import load_file

from workbench import Neurons
from workbench.activations.labelled import Item, Labelled, folder_name, read_labelled
from workbench.activations.losses import losses
from workbench.activations.sets import read_set, write_set
from workbench.facts.facts import joined
from workbench.neurons.controls import matched_set
from workbench.neurons.subject import NeuronSubject, open_neurons, some_of_each_task
from workbench.run.opened import resolve_model
from workbench.upkeep.train import train_brick

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"
CPU = torch.device("cpu")
ITEMS = 3  # held-out items of a task
WAYS: dict[str, tuple[float, ...]] = {
    "scaled": (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5),
    "random": (0.5, 0.75, 1.0, 1.5),
    "subtracted": (-1.0, 0.25, 0.5, 1.0, 1.5, 2.0),
    "at the set": (-1.0, 2.0, 5.0, 10.0, 20.0),
    "at random": (-1.0, 2.0, 5.0, 10.0, 20.0, 40.0),
}
"""Way -> its strengths. An adapter's changes to 5 % of the neurons are small, and larger strengths need no more data."""
SETTINGS = {
    "base": str(BASE),
    "data": "train.jsonl",
    "method": "lora",
    "rank": 4,
    "alpha": 8,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "steps": 40,
    "batch_size": 8,
    "warmup": 5,
    "schedule": "cosine",
    "seed": 0,
    "save_every": 0,
}


@dataclass(frozen=True)
class World:
    """The starter base with its sets and adapters.

    Attributes:
        folder: Folder of the sets, the adapters and the losses.
        subject: The live model, whose weights are exchanged.
        texts: The labelled texts.
    """

    folder: Path
    subject: NeuronSubject
    texts: Labelled

    @property
    def base(self) -> Path:
        """Directory of the base."""
        return BASE

    def measure(self, items: Sequence[Item]) -> dict[str, float]:
        """Return the mean loss of the answers of each function, in nats a token."""
        found = losses(self.subject.model, self.subject.rows(items), scored="response")
        mean = {}
        for name in self.texts.functions:
            own = torch.tensor([item.function == name for item in items])
            mean[name] = float(found.sums[own].sum() / found.tokens[own].sum())
        return mean

    def adapter(self, function: str) -> Path:
        """Train the adapter of a function once, and return its folder."""
        out = self.folder / f"adapter-{folder_name(function)}"
        if not (out / "brick.yaml").is_file():
            out.mkdir(parents=True, exist_ok=True)
            items = [item for item in self.texts.in_split("train") if item.function == function]
            rows = [{"prompt": item.prompt, "completion": joined(item.prompt, item.response)} for item in items]
            (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            (out / "train.yaml").write_text(yaml.safe_dump(SETTINGS), "utf-8")
            train_brick(out, CPU, score=False)
        return out

    def sets(self, function: str) -> dict[str, Path]:
        """Return the folders of a function's set and of random neurons of the same mean activation."""
        analyzed = self.folder / "analyzed"
        if not (analyzed / "functions.json").is_file():
            command = [sys.executable, "-m", "workbench", "analyze", str(BASE), "--data", str(DATA), "--out", str(analyzed)]
            subprocess.run(command, cwd=PROJECT, check=True)
        chosen = analyzed / "sets" / folder_name(function)
        random = self.folder / f"random-{folder_name(function)}"
        if not random.is_dir():
            scores = load_file(analyzed / "functions.safetensors")
            means = [scores[f"mean_abs.{site.layer}"].mean(0) for site in self.subject.sites]
            generator = torch.Generator().manual_seed(self.texts.functions.index(function))
            drawn = matched_set(f"random {function}", self.subject.sites, read_set(chosen), means, generator)
            write_set(random, drawn)
        return {"set": chosen, "random": random}

    def steps(self, function: str) -> Iterator[tuple[str, float, dict[str, Any]]]:
        """Yield way, strength and step of every configuration of a function."""
        sets = self.sets(function)
        places = {"scaled": sets["set"], "random": sets["random"], "at the set": sets["set"], "at random": sets["random"]}
        for way, strengths in WAYS.items():
            for strength in strengths:
                if way in ("scaled", "random"):
                    yield way, strength, {"edit": "scale_neurons", "neurons": str(places[way]), "factor": 1 - strength}
                    continue
                where = {"where": {"neurons": str(places[way]), "include": ["*mlp*"]}} if way in places else {}
                yield way, strength, {"merge": "task_arithmetic", "bricks": {"adapter": -strength}, **where}


def main() -> None:
    """Choose, train, apply and measure, and write the results file after every function."""
    parser = parser_of(__doc__, "neuron-bricks")
    parser.add_argument("--functions", nargs="+", help="names of functions; default: all")
    parser.add_argument("--folder", type=Path, help="folder of the sets, adapters and losses to keep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        subject = open_neurons(replace(resolve_model(str(BASE), PROJECT), name="starter base"), CPU)
        world = World(folder, subject, read_labelled(DATA, DATA.name))
        items = some_of_each_task(world.texts.in_split("heldout"), ITEMS)
        before, rows = world.measure(items), []
        for function in options.functions or world.texts.functions:
            rows.append(measured(world, function, items))
            document = {"items": len(items), "before": before, "settings": small(SETTINGS), "functions": rows}
            write_results(options.out, document)
        if not options.functions:
            write_results(options.out, {**document, "pairs": pairs(world, items)})


def measured(world: World, function: str, items: Sequence[Item]) -> dict[str, Any]:
    """Apply every way at every strength; what was measured before is kept."""
    kept = world.folder / f"{folder_name(function)}.json"
    adapter, steps = world.adapter(function), list(world.steps(function))
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {way: {} for way in WAYS}
    for way, strength, step in steps:
        if str(strength) not in found[way]:
            places = {"adapter": adapter} if "merge" in step else {}
            merged_into(world.subject.model, world, places, step)
            found[way][str(strength)] = world.measure(items)
            kept.write_text(json.dumps(found), "utf-8")
            print(function, way, strength, {k: round(v, 3) for k, v in found[way][str(strength)].items()}, flush=True)
    chosen = read_set(world.sets(function)["set"])
    weights = load_file(adapter / "adapter_model.safetensors")
    hidden = int(world.subject.model.config.hidden_size)
    values = {
        "scaled": chosen.size * hidden,
        "subtracted": sum(w.numel() for w in weights.values()),
        "at the set": 3 * chosen.size * hidden,
    }
    return {
        "function": function,
        "values": values,
        "losses": {way: {str(s): found[way][str(s)] for s in WAYS[way]} for way in WAYS},
    }


def pairs(world: World, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Switch each two sets off together, and return the losses."""
    unchanged = {"edit": "scale_neurons", "neurons": str(world.sets(world.texts.functions[0])["set"]), "factor": 1.0}
    merged_into(world.subject.model, world, {}, unchanged)
    neurons, found = Neurons(world.subject.model), []
    for one, other in combinations(world.texts.functions, 2):
        with neurons.scaled(world.sets(one)["set"]), neurons.scaled(world.sets(other)["set"]):
            found.append({"functions": [one, other], "losses": world.measure(items)})
        print(one, other, flush=True)
    return found


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a training without places."""
    return {key: value for key, value in settings.items() if key not in ("base", "data")}


if __name__ == "__main__":
    main()
