"""Run the workbench's tests on a CUDA device, and compare its speed with mergekit and lm-eval in the same run.

    make gpu                       everything, under nine minutes on one card
    python benchmarks/gpu.py --seconds 200 --size XS
    python benchmarks/gpu.py --dry-run                 without a device: are tests, inputs and command lines there?

Without a CUDA device it prints one line and ends with exit code 0.

1. tests   `pytest -m gpu`: how many passed, failed and were skipped.
2. merge   Three bf16 fine-tunes, or three LoRA adapters, of a random model with the matrices of an 8 B llama (8 of its 32 layers):
           `workbench run --device cuda` against `mergekit-yaml --cuda`, wall seconds of whole processes with their inputs in the page
           cache. `over_floor` is the workbench's wall time over that of a process that only reads the inputs and writes the output.
3. swap    Seconds to compute a configuration of the starter base on the device, and to exchange it for the live model's weights.
4. eval    `workbench eval` of one recipe on the suite `three` against `lm_eval` on its written checkpoint, same items, whole processes.
5. search  `workbench search` of a few candidates against `mergekit-yaml --cuda` and `lm_eval` for one of them.

A part that would start after the time limit is left out and named; a process ends after ten minutes. The results file is written after each part.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge
import search
import torch
from models import SHAPES, make_models
from record import parser_of, write_results

PROJECT = Path(__file__).resolve().parents[1]
METHODS = ("linear", "task_arithmetic", "ties", "lora")
RECIPE, SUITE = "recipes/starter-ties.yaml", "three"


def tests() -> dict[str, Any]:
    """Run the tests that need a device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    process = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=search.LONGEST)
    summary = process.stdout.strip().splitlines()[-1] if process.stdout.strip() else process.stderr[-500:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error|errors)", summary)}
    failures = [line for line in process.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "exit_code": process.returncode,
        **counts,
        "failures": failures,
        **({"output": process.stdout[-6000:]} if failures else {}),
    }


def merges(folder: Path, size: str) -> list[dict[str, Any]]:
    """Run both tools on the same models, on all cores."""
    cores = os.cpu_count() or 1
    threads, cpus = min(8, cores), f"0-{cores - 1}"
    models_folder = folder / size
    models_folder.mkdir()
    make_models(models_folder, size, device="cuda")
    rows = []
    for method in METHODS:
        workbench = merge.ours(models_folder, method, threads, cores - 1, "cuda")
        mergekit = merge.theirs(models_folder, method, "bfloat16", cpus, ("--cuda",))
        floor = merge.floor(models_folder, method, cores - 1)
        rows.append(
            {
                "method": method,
                "workbench": workbench,
                "mergekit": mergekit,
                "floor": floor,
                "wall_ratio": round(mergekit["wall"] / workbench["wall"], 2),
                "over_floor": round(workbench["wall"] / floor["wall"], 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    shutil.rmtree(models_folder)
    return rows


def swaps() -> dict[str, float]:
    """Compute a configuration of the starter base and exchange weights, on the device and on the CPU."""
    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.materialize import configuration_digest, materialize, swap

    seconds: dict[str, float] = {}
    for name in ("cuda", "cpu"):
        device = torch.device(name)
        loaded = load_recipe(PROJECT / RECIPE)
        base, merged = resolve(loaded.derive("base", [])), resolve(loaded)
        model = materialize(base, device)
        (merged.cache / "configurations" / f"{merged.key}.json").unlink(missing_ok=True)
        started = time.perf_counter()
        _, tensors = configuration_digest(merged, device)
        computed = time.perf_counter()
        with swap(model, merged, tensors):
            if name == "cuda":
                torch.cuda.synchronize()
            seconds |= {f"{name}_compute": round(computed - started, 3), f"{name}_swap": round(time.perf_counter() - computed, 3)}
    return seconds


def evals(folder: Path) -> dict[str, float]:
    """Time `workbench eval` and lm-eval on the same tasks."""
    project = folder / "eval"
    project.mkdir()
    for name in ("bricks", "evals", "recipes"):
        (project / name).symlink_to(PROJECT / name, target_is_directory=True)
    python = [sys.executable, "-m", "workbench"]
    model = project / "model"
    search.timed([*python, "run", RECIPE, "-o", str(model), "--runs-dir", "runs", "-q"], project)
    workbench = search.timed(
        [*python, "eval", RECIPE, "--suite", SUITE, "--no-controls", "--runs-dir", "runs", "--device", "cuda"], project
    )
    lm_eval = search.timed(
        [
            *search.LM_EVAL,
            "--model_args",
            f"pretrained={model},dtype=bfloat16,logits_cache=False,softmax_dtype=float32",
            "--tasks",
            ",".join(search.TASKS),
            "--include_path",
            "evals/tasks",
            "--batch_size",
            "32",
            "--device",
            "cuda:0",
        ],
        project,
    )
    return {
        "workbench": workbench["wall"],
        "lm_eval": lm_eval["wall"],
        "wall_ratio": round(lm_eval["wall"] / workbench["wall"], 2),
    }


def searches(folder: Path, candidates: int) -> dict[str, Any]:
    """Time a search in memory, and one of its candidates by command lines; the peer's time is scaled up to all candidates."""
    search_result = search.searched(folder / "search", candidates, {"items": [100000]}, "cuda")
    trial = search_result["document"]["trials"][0]
    peer_result = search.peer(folder / "peer", trial["values"], search_result["samples"], "cuda")
    return {
        "candidates": candidates,
        "workbench": search_result["wall"],
        "peer_one": peer_result["wall"],
        "wall_ratio": round(candidates * peer_result["wall"] / search_result["wall"], 2),
        "score": trial["scores"][0],
        "peer_score": peer_result["mean"],
    }


def dry_parts(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what can be checked of each part where there is no device: each raises an error if an input or an option is not there."""

    def said(*command: str, place: Path = PROJECT) -> str:
        process = subprocess.run(
            [sys.executable, "-m", *command], cwd=place, capture_output=True, text=True, check=False, timeout=300
        )
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {process.stdout[-1000:]}{process.stderr[-1000:]}")
        return process.stdout

    def planned(recipe: str, place: Path = PROJECT) -> int:
        return int(json.loads(said("workbench", "plan", recipe, "--device", "cuda", "--json", place=place))["device_bytes"])

    def collected() -> int:
        lines = said("pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests").splitlines()
        return sum("::" in line for line in lines)

    def merged() -> dict[str, int]:
        from mergekit.config import MergeConfiguration
        from yaml import safe_load

        make_models(folder, "XS")
        for method in METHODS:
            MergeConfiguration.model_validate(safe_load(merge.peer(folder, method, "bfloat16").read_text("utf-8")))
            merge.warm(folder, method)
        return {method: planned(str(merge.recipe(folder, method)), folder) for method in METHODS}

    def tools() -> list[str]:
        return [
            str(Path(tool).resolve(strict=True)) for tool in (search.LM_EVAL[0], Path(sys.executable).parent / "mergekit-yaml")
        ]

    return {
        "tests": collected,
        "merge": merged,
        "swap": lambda: planned(RECIPE),
        "eval": lambda: [
            *tools(),
            *(str((PROJECT / "evals" / "tasks" / f"{task}.yaml").resolve(strict=True)) for task in search.TASKS),
        ],
        "search": lambda: [str((PROJECT / "bricks" / name).resolve(strict=True)) for name in search.BRICKS],
    }


def main() -> int:
    """Run the parts for which there is time, and write the results file after each."""
    parser = parser_of(__doc__, "gpu")
    parser.add_argument(
        "--size", choices=[size for size in SHAPES if size != "8B"], default="8B-8", help="shape of the merged models"
    )
    parser.add_argument("--seconds", type=int, default=480, help="seconds after which no further part starts")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--dry-run", action="store_true", help="check inputs and command lines; needs no device")
    parser.add_argument("--folder", type=Path, help="where models are made; default: a temporary folder")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("make gpu: no CUDA device here, nothing was run")
        return 0
    search.LONGEST = 600
    started = time.monotonic()
    document: dict[str, Any] = {
        "device": "none: a dry run" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "size": options.size,
        "left_out": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Any]] = {
            "tests": tests,
            "merge": lambda: merges(folder, options.size),
            "swap": swaps,
            "eval": lambda: evals(folder),
            "search": lambda: searches(folder, options.candidates),
        }
        if options.dry_run:
            parts = dry_parts(folder)
        for part, work in parts.items():
            if time.monotonic() - started > options.seconds:
                document["left_out"].append(part)
                continue
            begun = time.monotonic()
            try:
                document[part] = work()
            except (Exception, SystemExit) as error:  # noqa: BLE001 (one part's failure must not hide the others' figures)
                document[part] = {"failed": f"{type(error).__name__}: {str(error)[-3000:]}"}
            document.setdefault("seconds", {})[part] = round(time.monotonic() - begun, 1)
            print(part, json.dumps(document[part]), flush=True)
            write_results(options.out, document)
    failed = [
        part
        for part in parts
        if isinstance(document.get(part), dict) and ("failed" in document[part] or document[part].get("exit_code"))
    ]
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
