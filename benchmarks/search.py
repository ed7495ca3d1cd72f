"""Compare a search with the same candidates by command lines: one call of `mergekit-yaml` and one of `lm_eval` per candidate.

    python benchmarks/search.py
    python benchmarks/search.py --candidates 2 --peer 1      a quick look

The candidates are drawn at random from methods and brick weights of three skills on the starter base, with one seed. They are scored in three
ways on the same items (the search half of the suite `three`), in bfloat16, each as its own process, including its children:

    search    `workbench search`: one process, candidates in memory, stopped early if they fall behind
    in full   the same, but every candidate is scored on all items
    peer      for each candidate `mergekit-yaml` writes it and `lm_eval` loads and scores it

Wall seconds are those of all cores, which both sides use; CPU seconds are recorded too. The study records the parts of the search's own time.
The scores of the last search are also compared with the peer's, one by one. Results go to benchmarks/results/search.json.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
TASKS = {"add": "exact_match", "reverse": "exact_match", "triage_mc": "acc"}
LONGEST: float | None = None
"""Seconds after which a process is ended; None: never."""
LM_EVAL = (str(Path(sys.executable).parent / "lm_eval"), "run", "--model", "hf")
BRICKS = ("add", "reverse", "triage")
STEP = {"id": "mix", "merge": "ties", "density": 0.4, "weigh": "before", "divide": "weight"}  # mergekit's variant
SPACE = {"mix.merge": ["ties", "task_arithmetic"], **{f"mix.bricks.{name}": [0.2, 2.0] for name in BRICKS}}


def main() -> None:
    """Time all ways and write the results file."""
    parser = parser_of(__doc__, "search")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument(
        "--peer", type=int, help="number of candidates that the peer runs; its time is scaled up, which the results record"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        quick = searched(folder / "search", options.candidates, {})
        full = searched(folder / "full", options.candidates, {"items": [100000]})
        trials = full["document"]["trials"][: options.peer or options.candidates]
        peers = [peer(folder / "peer", trial["values"], full["samples"]) for trial in trials]
        scale = options.candidates / len(peers)
        quick_document, full_document = quick.pop("document"), full.pop("document")
        samples = full.pop("samples")
        quick.pop("samples")
        wall, cpu = (scale * sum(p[key] for p in peers) for key in ("wall", "cpu"))
        document = {
            "candidates": options.candidates,
            "by_peer": len(peers),
            "items": {t: len(i) for t, i in samples.items()},
            "search": {**quick, "given_up": sum(t["stopped"] for t in quick_document["trials"]), "parts": parts(quick_document)},
            "in_full": {**full, "parts": parts(full_document)},
            "peer": {
                "wall": round(wall, 1),
                "cpu": round(cpu, 1),
                "merge": round(scale * sum(p["merge"] for p in peers), 1),
                "score": round(scale * sum(p["score"] for p in peers), 1),
            },
            "ratio": {
                name: {key: round(value / way[key], 2) for key, value in (("wall", wall), ("cpu", cpu))}
                for name, way in (("search", quick), ("in_full", full))
            },
            "scores": [
                {"values": t["values"], "ours": t["scores"][0], "peer": p["mean"]} for t, p in zip(trials, peers, strict=True)
            ],
        }
        write_results(options.out, document)
        print(json.dumps({k: document[k] for k in ("search", "in_full", "peer", "ratio", "scores")}, indent=1))


def searched(project: Path, candidates: int, fidelity: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Run a search in an empty project; return its seconds, its document, and the places in the data of the items that it used."""
    (project / "recipes").mkdir(parents=True)
    for name in ("bricks", "evals"):
        (project / name).symlink_to(PROJECT / name, target_is_directory=True)
    recipe = {
        "version": 1,
        "name": "timed",
        "base": "bricks/starter/base",
        "bricks": {name: f"bricks/{name}" for name in BRICKS},
        "steps": [STEP],
        "eval": ["three"],
        "search": {
            "space": SPACE,
            "trials": candidates,
            "sampler": "random",
            "controls": False,
            **({"fidelity": fidelity} if fidelity else {}),
        },
    }
    (project / "recipes" / "timed.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    seconds = timed([sys.executable, "-m", "workbench", "search", "recipes/timed.yaml", "-q", "--device", device], project)
    (result,) = (project / "runs" / "search").glob("*/search.json")
    return {**seconds, "document": json.loads(result.read_text("utf-8")), "samples": samples(project)}


def samples(project: Path) -> dict[str, list[int]]:
    """Return task -> places in its data of the items that candidates are scored on."""
    from workbench.recipe.recipe import load_recipe
    from workbench.search.run import Scoring, prepare

    search = prepare(load_recipe(project / "recipes" / "timed.yaml"), project / "runs", Scoring("cpu"))
    places: dict[str, list[int]] = {}
    for task in TASKS:
        ids = {item.id for stage in search.stages.search for plan in stage for item in plan.items[task]}
        data = PROJECT / "evals" / "tasks" / "data" / f"{task.removesuffix('_mc')}.jsonl"
        lines = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
        places[task] = [i for i, doc in enumerate(lines) if doc["id"] in ids]
    return places


def peer(
    folder: Path, values: Mapping[str, Any], sample_places: Mapping[str, Sequence[int]], device: str = "cpu"
) -> dict[str, Any]:
    """Measure one candidate with mergekit's and lm-eval's command lines."""
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "scores", ignore_errors=True)
    base = str(PROJECT / "bricks" / "starter" / "base")
    ties = values["mix.merge"] == "ties"
    models = [
        {
            "model": f"{base}+{PROJECT / 'bricks' / name}",
            "parameters": {"weight": values[f"mix.bricks.{name}"], **({"density": 0.4} if ties else {})},
        }
        for name in BRICKS
    ]
    config = {
        "merge_method": values["mix.merge"],
        "base_model": base,
        "models": models,
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "parameters": {"normalize": ties, "lambda": 1.0},
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(config), "utf-8")
    tools = Path(sys.executable).parent
    merging = timed(
        [
            str(tools / "mergekit-yaml"),
            "merge.yaml",
            "out",
            "--quiet",
            "--lora-merge-cache",
            "lora",
            *(["--cuda"] if device == "cuda" else []),
        ],
        folder,
    )
    scoring = timed(
        [
            *LM_EVAL,
            "--model_args",
            "pretrained=out,dtype=bfloat16,logits_cache=False,softmax_dtype=float32",
            "--tasks",
            ",".join(TASKS),
            "--include_path",
            str(PROJECT / "evals" / "tasks"),
            "--samples",
            json.dumps(sample_places),
            "--batch_size",
            "32",
            "--device",
            device,
            "--output_path",
            "scores",
        ],
        folder,
    )
    (file,) = (folder / "scores").rglob("results_*.json")
    results = json.loads(file.read_text("utf-8"))["results"]
    mean = sum(next(v for k, v in results[task].items() if k.startswith(f"{metric},")) for task, metric in TASKS.items()) / len(
        TASKS
    )
    print(f"  peer {values}: {mean:.4f}, {merging['wall']:.1f} + {scoring['wall']:.1f} s", flush=True)
    return {
        "merge": merging["wall"],
        "score": scoring["wall"],
        "wall": merging["wall"] + scoring["wall"],
        "cpu": merging["cpu"] + scoring["cpu"],
        "mean": round(mean, 6),
    }


def timed(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a process and return its wall and CPU seconds, including its children; exit if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT), "TOKENIZERS_PARALLELISM": "false"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {process.stdout[-2000:]}{process.stderr[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - started, 2), "cpu": round(cpu, 2)}


def parts(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the wall seconds of the candidates by part; "rest" is drawing, comparing and reading scores."""
    seconds: dict[str, float] = {}
    for trial in document["trials"]:
        for part, part_seconds in trial["seconds"].items():
            seconds[part] = seconds.get(part, 0.0) + part_seconds
    total = seconds.pop("all", 0.0)
    return {**{k: round(v, 2) for k, v in seconds.items()}, "rest": round(total - sum(seconds.values()), 2)}


if __name__ == "__main__":
    main()
