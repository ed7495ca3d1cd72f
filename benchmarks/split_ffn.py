"""Dense feed-forward layers as experts without training, in the form of ExpertWeaver's table (arXiv 2602.15521): the source of a table in docs/growing.md.

    python benchmarks/split_ffn.py
    python benchmarks/split_ffn.py --base DIR --data FILE --device cuda --dtype bfloat16

Every row is a model that `grow: split_ffn` writes: stock architectures in which a token uses 75 % of the feed-forward neurons. Measured are the loss on held-out
tasks of labelled texts, whose train tasks calibrate, and with --suite the scores of `workbench eval`. Without --data, the project's own texts
(evals/abilities.jsonl). The results file is benchmarks/results/split-ffn.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import parser_of, write_results

from workbench.emergent.labelled import Item, Labelled, item_rows, read_labelled
from workbench.emergent.losses import ItemLosses, losses
from workbench.library.neurons_partition import loss_rise
from workbench.library.neurons_sparsity import some_of_each_task
from workbench.models.device import pick_device
from workbench.models.texts import longest_row
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.execute import execute

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / "bricks" / "starter" / "base"
DATA = PROJECT / "evals" / "abilities.jsonl"
LONGEST = 512
METHODS = ("random", "kmeans", "cmoe", "expertweaver")
ROUTERS = ("gate", "ridge")


def main() -> None:
    """Split the base in every way, measure, and write the results file."""
    given = _arguments()
    device = pick_device(given.device)
    data = read_labelled(given.data, given.data.name)
    items = some_of_each_task(data.of("heldout"), given.items)
    started = time.perf_counter()
    dense = _losses(given.base, items, device, given.dtype)
    rows: list[dict[str, Any]] = [{"name": "dense", **_row(dense, dense, items)}]
    models = {"dense": given.base}
    with TemporaryDirectory() as folder:
        project = Path(folder)
        _write_calibration(project / "calibration.jsonl", data)
        for method in given.methods.split(","):
            for router in ROUTERS:
                name = f"{method}-{router}"
                step = {"grow": "split_ffn", "method": method, "experts": given.experts, "sparsity": given.sparsity}
                step |= {"router": router, "calibration": "calibration.jsonl", "samples": given.samples, "check": "off"}
                before = time.perf_counter()
                document = execute(_resolved(name, step, given.base, project), project / "runs", device=device)
                seconds = time.perf_counter() - before
                models[name] = Path(document["model"])
                split = document["steps"][0]
                changed = _losses(models[name], items, device, given.dtype)
                shared = split["split"]["shared"]
                rows.append(
                    {
                        "name": name,
                        "method": method,
                        "router": router,
                        "into": split["into"],
                        "shared": [min(shared), max(shared)],
                        "captured": split["split"]["captured"],
                        "seconds": round(seconds, 1),
                        **_row(changed, dense, items),
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if not given.suite:
                    _remove(models.pop(name))
        scores = _scores(models, given, project) if given.suite else {}
    write_results(
        given.out,
        {
            **({"note": given.note} if given.note else {}),
            "base": "starter base" if given.base == BASE else given.base.name,
            "data": {"file": given.data.name, "items": len(items), "tasks": len({(i.function, i.task) for i in items})},
            "experts": given.experts,
            "sparsity": given.sparsity,
            "seconds": round(time.perf_counter() - started, 1),
            "rows": rows,
            **({"suite": given.suite, "limit": given.limit, "scores": scores} if given.suite else {}),
        },
    )


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, "split-ffn")
    parser.add_argument("--base", type=Path, default=BASE, help="directory of the dense model")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="labelled texts: train tasks calibrate, held-out tasks are measured"
    )
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer, shared ones included")
    parser.add_argument("--sparsity", type=float, default=0.25, help="share of the experts that a token does not use")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods that divide the neurons")
    parser.add_argument("--samples", type=int, default=256, help="calibration texts")
    parser.add_argument("--items", type=int, default=10, help="held-out texts of each task")
    parser.add_argument("--device", default="cpu", help="device of the models")
    parser.add_argument("--dtype", default="float32", help="dtype in which losses are computed")
    parser.add_argument("--suite", help="suite of `workbench eval` that scores the models as well")
    parser.add_argument("--limit", type=int, help="largest number of items of a task of the suite")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    return parser.parse_args()


def _write_calibration(path: Path, data: Labelled) -> None:
    """Write the texts of train tasks, ordered by task."""
    train = sorted(data.of("train"), key=lambda item: (item.function, item.task))
    lines = [
        json.dumps({"prompt": item.prompt, "response": item.response} if item.response else {"text": item.prompt})
        for item in train
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _resolved(name: str, step: dict[str, Any], base: Path, project: Path) -> Any:
    """Return the resolved recipe of one step."""
    return resolve(from_data({"version": 1, "name": name, "base": str(base.resolve()), "steps": [step]}, project))


def _losses(model: Path, items: Sequence[Item], device: torch.device, dtype: str) -> ItemLosses:
    """Return the losses of items on a model directory, loaded with transformers."""
    from transformers import AutoModelForCausalLM

    gc.collect()
    live = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True).to(device).eval()
    config = json.loads((model / "config.json").read_text("utf-8"))
    return losses(live, item_rows(items, load_tokenizer(model), longest_row(config, LONGEST)))


def _row(changed: ItemLosses, dense: ItemLosses, items: Sequence[Item]) -> dict[str, Any]:
    """Return the loss, the perplexity and the rise of the loss with its interval."""
    rise, low, high = loss_rise(changed, dense, items)
    return {"loss": changed.mean, "perplexity": math.exp(changed.mean), "rise": rise, "low": low, "high": high}


def _scores(models: dict[str, Path], given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Score the models with `workbench eval`; return model -> task -> value of its first metric."""
    places = [folder / "models" / name for name in models]
    for place, model in zip(places, models.values(), strict=True):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(model.resolve(), target_is_directory=True)
    command = [sys.executable, "-m", "workbench", "eval", *map(str, places), "--suite", given.suite, "--json"]
    command += ["--runs-dir", str(folder / "scores"), "--device", given.device]
    command += ["--limit", str(given.limit)] if given.limit else []
    printed = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    document = json.loads(printed)
    return {
        name: {task: next(iter(metrics.values()))["value"] for task, metrics in _metrics(found["tasks"]).items()}
        for name, found in ((c["name"], c) for c in document["configurations"])
    }


def _metrics(tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return task -> metric -> its value, without the number of items."""
    return {t: {m: v for m, v in row.items() if isinstance(v, dict) and "value" in v} for t, row in tasks.items()}


def _remove(model: Path) -> None:
    """Remove the weights of a measured model."""
    for file in model.glob("*.safetensors"):
        file.unlink()


if __name__ == "__main__":
    main()
